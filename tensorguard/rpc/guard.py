"""Interceptors of every server, synchronous or asyncio: authorisation, request id, error mapping.

A servicer raises a `TenSafeError`; the caller gets its status code, message and reason. Anything else becomes
INTERNAL with a generic message; the log gets the exception's type and frames, never its text or arguments.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from tensorguard.errors import PermissionDeniedError
from tensorguard.observability.logging import frames_of
from tensorguard.rpc.authorisation import Call, Rule
from tensorguard.rpc.request_id import REQUEST_ID_KEY, accepted_request_id
from tensorguard.rpc.status import public_error, wire_form
from tensorguard.rpc.tls import peer_of

log = structlog.get_logger(__name__)

# gRPC's own services, added by the server factory: open to anyone, passed through untouched.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


class _Gate:
    """What both kinds of server do before and after a servicer's method."""

    def __init__(self, table: Mapping[str, Rule]) -> None:
        self._table = dict(table)

    @staticmethod
    def is_open(method: str) -> bool:
        return method.startswith(OPEN_SERVICES)

    def authorise(
        self,
        method: str,
        metadata: Mapping[str, str | bytes],
        context: grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        rule = self._table.get(method)
        if rule is None:
            raise PermissionDeniedError("this method is not offered here")
        rule.check(Call(method, metadata, peer_of(context.auth_context())))


def _metadata(context: grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any]) -> dict[str, str | bytes]:
    pairs: Any = context.invocation_metadata() or ()
    return dict(pairs)


def _bound(method: str, metadata: Mapping[str, str | bytes]) -> AbstractContextManager[None]:
    """Log lines of the block carry the request id and the method."""
    request_id = accepted_request_id(metadata.get(REQUEST_ID_KEY))
    return structlog.contextvars.bound_contextvars(request_id=request_id, method=method.rsplit("/", 1)[-1])


def _refusal(error: BaseException) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """The wire form of an error, after logging what the caller is not told."""
    shown = public_error(error)
    if shown is error:
        log.info("call refused", reason=shown.reason)
    else:
        log.error("call failed", error_type=type(error).__name__, frames=frames_of(error))
    return wire_form(shown)


def _rewrap(handler: grpc.RpcMethodHandler[Any, Any], behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """The same kind of handler, with the same serialisers, around another function."""
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make: Any = makers[bool(handler.request_streaming), bool(handler.response_streaming)]
    rewrapped: grpc.RpcMethodHandler[Any, Any] = make(
        behaviour, handler.request_deserializer, handler.response_serializer
    )
    return rewrapped


def _function(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[..., Any]:
    functions = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(function for function in functions if function is not None)


class SyncGuard(grpc.ServerInterceptor):
    """For `grpc.server`."""

    def __init__(self, table: Mapping[str, Rule]) -> None:
        self._gate = _Gate(table)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        handler = continuation(handler_call_details)
        if handler is None or self._gate.is_open(method):
            return handler  # None: gRPC answers UNIMPLEMENTED
        function, gate = _function(handler), self._gate

        def refuse(context: Any, error: Exception) -> NoReturn:
            if context.code() is not None:
                raise error  # the servicer aborted the call itself
            code, message, trailing = _refusal(error)
            context.set_trailing_metadata(trailing)
            context.abort(code, message)
            raise AssertionError("abort raises")

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            metadata = _metadata(context)
            with _bound(method, metadata):
                try:
                    gate.authorise(method, metadata, context)
                    return function(request, context)
                except Exception as error:
                    if isinstance(error, grpc.RpcError) and not context.is_active():
                        raise  # the caller has gone: nobody to answer
                    refuse(context, error)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            metadata = _metadata(context)
            with _bound(method, metadata):
                try:
                    gate.authorise(method, metadata, context)
                    yield from function(request, context)
                except Exception as error:
                    if isinstance(error, grpc.RpcError) and not context.is_active():
                        return
                    refuse(context, error)

        return _rewrap(handler, stream if handler.response_streaming else unary)


class AsyncGuard(grpc.aio.ServerInterceptor):
    """For `grpc.aio.server`. Methods are coroutines or, where they stream, asynchronous generators."""

    def __init__(self, table: Mapping[str, Rule]) -> None:
        self._gate = _Gate(table)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or self._gate.is_open(method):
            return handler
        function, gate = _function(handler), self._gate

        async def refuse(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
            if isinstance(error, grpc.aio.AbortError):
                raise error
            code, message, trailing = _refusal(error)
            await context.abort(code, message, trailing)
            raise AssertionError("abort raises")

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            metadata = _metadata(context)
            with _bound(method, metadata):
                try:
                    gate.authorise(method, metadata, context)
                    return await function(request, context)
                except Exception as error:
                    await refuse(context, error)

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            metadata = _metadata(context)
            with _bound(method, metadata):
                try:
                    gate.authorise(method, metadata, context)
                    async for response in function(request, context):
                        yield response
                except Exception as error:
                    await refuse(context, error)

        return _rewrap(handler, stream if handler.response_streaming else unary)
