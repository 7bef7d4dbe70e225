"""The HTTP side: routes, authentication, request ids and OpenAI's error format on every path."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.forward import forward, read_body
from services.gateway.inference import EvidenceWatch, InferenceClient
from services.gateway.keys import Caller, KeyStore
from services.gateway.protocol import error_object, model_list, model_object, requested_model
from services.gateway.settings import GatewaySettings
from tensorguard.errors import AuthenticationError, NotFoundError, PermissionDeniedError, TenSafeError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2
from tensorguard.rpc.options import is_loopback
from tensorguard.rpc.request_id import new_request_id
from tensorguard.rpc.status import http_status, public_error, status_of

_log = structlog.get_logger(__name__)
_HEALTH = "/health"
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it; nginx's number, for the log


class Gateway:
    """The endpoints. `keys` is None where authentication is off."""

    def __init__(self, settings: GatewaySettings, client: InferenceClient, keys: KeyStore | None) -> None:
        self._settings = settings
        self._client = client
        self._keys = keys

    async def health(self, request: Request) -> Response:
        """200 while requests can be answered, 503 while the inference service is away. Needs no key."""
        await self._client.status()
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        caller = self._caller(request)
        return JSONResponse(model_list(m for m in await self._client.models() if caller.may_use(m.name)))

    async def model(self, request: Request) -> Response:
        caller = self._caller(request)
        name = request.path_params["name"]
        for model in await self._client.models():
            if model.name == name and caller.may_use(name):
                return JSONResponse(model_object(model))
        raise _no_such_model(name)

    async def chat_completions(self, request: Request) -> Response:
        return await self._complete(request, inference_pb2.ENDPOINT_CHAT_COMPLETIONS)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, inference_pb2.ENDPOINT_COMPLETIONS)

    async def _complete(self, request: Request, endpoint: inference_pb2.Endpoint.ValueType) -> Response:
        caller = self._caller(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also keeps web pages away: a browser sends JSON to another origin only after asking.
            raise HTTPException(415, "Send the request with the header Content-Type: application/json.")
        body = await read_body(request, self._settings.max_body_bytes, self._settings.body_timeout_seconds)
        model = requested_model(body)
        if not caller.may_use(model):
            # The same answer as for a name that does not exist: keys do not reveal other tenants' adapters.
            raise _no_such_model(model)
        message = inference_pb2.CompleteRequest(
            request_id=request.scope["tensafe.request_id"], tenant=caller.tenant, endpoint=endpoint, body=body
        )
        return await forward(request, self._client, message, self._settings.request_timeout_seconds)

    def _caller(self, request: Request) -> Caller:
        if self._keys is None:
            if not is_loopback(request.url.hostname or ""):
                # A web page whose name was pointed at this machine (DNS rebinding) is not a local caller.
                raise PermissionDeniedError("Authentication is off: address this server by localhost or 127.0.0.1.")
            return Caller(self._settings.anonymous_tenant, "", None)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("You didn't provide an API key: send the header Authorization: Bearer KEY.")
        caller = self._keys.authenticate(key.strip())
        structlog.contextvars.bind_contextvars(tenant=caller.tenant, key_id=caller.key_id)
        return caller


def _no_such_model(name: str) -> NotFoundError:
    return NotFoundError(f"The model `{name[:256]}` does not exist or you do not have access to it.")


def build_app(
    settings: GatewaySettings, client: InferenceClient, keys: KeyStore | None, evidence: EvidenceWatch
) -> ASGIApp:
    """The whole HTTP application."""
    gateway = Gateway(settings, client, keys)
    routes = [
        Route(_HEALTH, gateway.health, methods=["GET"]),
        Route("/v1/models", gateway.models, methods=["GET"]),
        Route("/v1/models/{name:path}", gateway.model, methods=["GET"]),
        Route("/v1/chat/completions", gateway.chat_completions, methods=["POST"]),
        Route("/v1/completions", gateway.completions, methods=["POST"]),
    ]
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: _http_error,
        TenSafeError: _tensafe_error,
        ClientDisconnect: _client_gone,
    }
    return RequestContext(Starlette(routes=routes, exception_handlers=handlers), evidence)


def _level(path: str, level: int = logging.INFO) -> int:
    """Probes ask several times a second while services start; only what users ask is of interest."""
    return logging.DEBUG if path == _HEALTH else level


async def _http_error(request: Request, error: Exception) -> Response:
    """404, 405, 413 and the like from routing and body reading."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code in (404, 405):
        message = f"Invalid URL ({request.method} {request.url.path[:256]})"
    code = {404: "unknown_url", 405: "method_not_supported", 413: "request_too_large"}.get(error.status_code)
    return JSONResponse(error_object(error.status_code, message, code), error.status_code, headers=error.headers)


async def _tensafe_error(request: Request, error: Exception) -> Response:
    shown = public_error(error)
    status = http_status(shown)
    _log.log(
        _level(request.url.path, logging.WARNING),
        "request_refused",
        reason=getattr(error, "reason", "internal"),
        status=status,
    )
    retry_after = status_of(shown).retry_after
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    code, param = shown.reason, None
    if isinstance(error, AuthenticationError):
        code = "invalid_api_key"
    elif isinstance(error, NotFoundError):
        code, param = "model_not_found", "model"
    return JSONResponse(error_object(status, shown.message, code, param), status, headers=headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    _log.info("client_disconnected")
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


class RequestContext:
    """Outermost layer: a request id and common headers for every answer, and a 500 for a defect."""

    def __init__(self, app: ASGIApp, evidence: EvidenceWatch) -> None:
        self._app = app
        self._evidence = evidence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        # Never taken from the caller: it names the request inside vLLM, where ids must not collide.
        request_id = new_request_id()
        scope["tensafe.request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kind = await self._evidence.kind()
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                    (b"x-tensafe-evidence", kind.encode("ascii", "replace")),
                ]
                _log.log(
                    _level(scope["path"]),
                    "answered",
                    method=scope["method"],
                    path=scope["path"][:256],
                    status=message["status"],
                )
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id), contextlib.ExitStack() as stack:
            stack.callback(structlog.contextvars.unbind_contextvars, "tenant", "key_id")
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as error:
                _log.error("request_failed", exception_type=type(error).__name__)
                if started:
                    raise
                shown = public_error(error)
                document = error_object(500, shown.message, shown.reason)
                await JSONResponse(document, 500)(scope, receive, send_with_headers)
