"""OpenAI requests in, OpenAI answers out; what happens between is vLLM's own serving code.

Every model name has serving objects of its own on its own route to the engine
(`tensorguard.backends.vllm.routing`), so the name a request carries decides once and for all whether the
adapter computes it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError, VLLMError
from vllm.renderers.online_renderer import OnlineRenderer

from tensorguard.backends.vllm.routing import ModelRoute
from tensorguard.errors import InvalidInputError, TenSafeError
from tensorguard.observability.logging import frames_of
from tensorguard.rpc.status import error_of, http_status, public_error

log = structlog.get_logger(__name__)

JSON_TYPE = "application/json"
EVENT_STREAM = "text/event-stream"
# What reaches into the engine beside the model name. The server sets these, or nobody does.
RESERVED_FIELDS = ("cache_salt", "vllm_xargs", "lora_request", "kv_transfer_params", "ec_transfer_params")
_STREAMED_ERROR = 'data: {"error"'


@dataclass(frozen=True, slots=True)
class Answer:
    """HTTP status and content type, then the body in pieces."""

    status: int
    content_type: str
    body: AsyncIterator[bytes]


def error_document(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Streamed:
    """Our own errors keep their reason on the way through vLLM's streams."""

    def _convert_generation_error_to_streaming_response(self, error: GenerationError) -> str:
        if isinstance(error, TenSafeError):
            return json.dumps(_document_of(error))
        return super()._convert_generation_error_to_streaming_response(error)  # type: ignore[misc]


class _Chat(_Streamed, OpenAIServingChat):
    pass


class _Completion(_Streamed, OpenAIServingCompletion):
    pass


class ModelAnswers:
    """One served model name: of an adapter, one release of it."""

    def __init__(self, name: str, route: ModelRoute, renderer: OnlineRenderer, tool_parser: str | None) -> None:
        self.name = name
        self.adapter = route.adapter
        self.held = route.held
        models = OpenAIServingModels(route, [BaseModelPath(name=name, model_path=name)])
        common: dict[str, Any] = {"online_renderer": renderer, "request_logger": None}
        self._chat = _Chat(
            route,
            models,
            "assistant",
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=tool_parser is not None,
            tool_parser=tool_parser,
            **common,
        )
        self._completion = _Completion(route, models, **common)

    async def chat(self, document: dict[str, Any]) -> Answer:
        """/v1/chat/completions"""
        return await _answer(ChatCompletionRequest, self._chat.create_chat_completion, document)

    async def completions(self, document: dict[str, Any]) -> Answer:
        """/v1/completions"""
        return await _answer(CompletionRequest, self._completion.create_completion, document)


def make_renderer(route: ModelRoute, tool_parser: str | None) -> OnlineRenderer:
    """vLLM's chat templates and tokenisation, shared by all model names. Templates from requests are
    refused."""
    return OnlineRenderer(
        route.model_config,
        route.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=tool_parser is not None,
        tool_parser=tool_parser,
    )


def parse_body(body: bytes, request_id: str) -> dict[str, Any]:
    """The JSON object of a request, with this service's request id. Raises InvalidInputError."""
    try:
        document = json.loads(body)
    except RecursionError:
        raise InvalidInputError("The request body is nested too deeply.") from None
    except ValueError:
        raise InvalidInputError("The request body is not JSON.") from None
    if not isinstance(document, dict):
        raise InvalidInputError("The request body must be a JSON object.")
    for field in RESERVED_FIELDS:
        if document.get(field) is not None:
            raise InvalidInputError(f"{field}: this field is set by the server and cannot be part of a request.")
    if not isinstance(document.get("model"), str):
        raise InvalidInputError('You must provide a "model" name (a string).')
    document["request_id"] = request_id or uuid.uuid4().hex
    return document


async def json_answer(status: int, document: dict[str, Any]) -> Answer:
    """A body that is one JSON document."""

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(document).encode()

    return Answer(status, JSON_TYPE, body())


async def error_answer(error: Exception) -> Answer:
    """What a user is told of an error: TenSafe's and vLLM's own words, nothing of anything else."""
    document = _document_of(error)
    return await json_answer(_status_of(error), document)


async def _answer(kind: type[BaseModel], create: Callable[[Any], Any], document: dict[str, Any]) -> Answer:
    try:
        request = kind.model_validate(document)
        result = await create(request)
        if isinstance(result, ErrorResponse):
            return await json_answer(result.error.code, _from_vllm(result))
        if isinstance(result, BaseModel):
            return Answer(HTTPStatus.OK, JSON_TYPE, _once(result.model_dump_json().encode()))
        return await _stream(result)
    except Exception as error:
        if isinstance(error, TenSafeError) and not isinstance(error, InvalidInputError):
            raise
        return await error_answer(error)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _stream(events: AsyncGenerator[str, None]) -> Answer:
    """The head goes out with the first event: a request that fails before it has one fails with its status.

    An error of ours is raised again, so that the call ends with its gRPC status and reason.
    """
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    if first.startswith(_STREAMED_ERROR):
        await events.aclose()
        _raise_ours(first)
        error = json.loads(first.removeprefix("data: "))["error"]
        status = error["code"] if isinstance(error["code"], int) else HTTPStatus.INTERNAL_SERVER_ERROR
        return await json_answer(status, error_document(status, error["message"], None, error["param"]))

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(events):
            yield first.encode()
            async for event in events:
                if event.startswith(_STREAMED_ERROR):
                    _raise_ours(event)
                    yield event.encode()
                    return  # vLLM would go on with [DONE], which says that the answer is complete
                yield event.encode()

    return Answer(HTTPStatus.OK, EVENT_STREAM, body())


def _raise_ours(event: str) -> None:
    """Raise the TenSafeError that became `event` (`_Streamed`), if it was one."""
    error = json.loads(event.removeprefix("data: "))["error"]
    if isinstance(error["code"], str) and (ours := error_of(error["code"], error["message"])) is not None:
        raise ours


def _status_of(error: Exception) -> int:
    if isinstance(error, ValidationError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, TenSafeError):
        return http_status(public_error(error))
    if isinstance(error, (VLLMError, ValueError, TypeError, NotImplementedError)):
        return create_error_response(error).error.code
    return HTTPStatus.INTERNAL_SERVER_ERROR


def _document_of(error: Exception) -> dict[str, Any]:
    status = _status_of(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        return error_document(status, f"{param or 'body'}: {first['msg']}", None, param)
    if isinstance(error, TenSafeError):
        shown = public_error(error)
        code = shown.reason if shown.reason != "invalid_input" else None
        return error_document(status, shown.message, code)
    if isinstance(error, (VLLMError, ValueError, TypeError, NotImplementedError)) and status < 500:
        return _from_vllm(create_error_response(error))
    log.error("request_failed", error_type=type(error).__name__, frames=frames_of(error))
    return error_document(status, "The server had an internal error; its log has the details.", "internal")


def _from_vllm(response: ErrorResponse) -> dict[str, Any]:
    error = response.error
    return error_document(error.code, error.message, None, error.param)


__all__ = [
    "Answer",
    "ModelAnswers",
    "error_answer",
    "error_document",
    "json_answer",
    "make_renderer",
    "parse_body",
]
