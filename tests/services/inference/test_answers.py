"""OpenAI's JSON in and out, without an engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GenerationError

from services.inference.answers import RESERVED_FIELDS, _answer, _stream, _Streamed, error_answer, parse_body
from tensorguard.backends.vllm.failures import ENDINGS
from tensorguard.errors import InvalidInputError, TenSafeError, UnavailableError


async def document(answer: Any) -> dict[str, Any]:
    return dict(json.loads(b"".join([piece async for piece in answer.body])))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"{}", b'{"model": 1}', b"[" * 100_000])
def test_what_is_not_a_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse_body(body, "")


@given(st.binary(max_size=200))
def test_no_body_breaks_the_parser(body: bytes) -> None:
    with contextlib.suppress(TenSafeError):
        parse_body(body, "r")


@pytest.mark.parametrize("field", RESERVED_FIELDS)
def test_fields_of_the_server_are_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidInputError, match=field):
        parse_body(json.dumps({"model": "m", field: {"a": 1}}).encode(), "")
    parse_body(json.dumps({"model": "m", field: None}).encode(), "")


def test_the_request_id_is_the_services() -> None:
    body = json.dumps({"model": "m", "request_id": "theirs"}).encode()
    assert parse_body(body, "ours")["request_id"] == "ours"
    assert parse_body(body, "")["request_id"] not in ("", "theirs")


class Streaming(_Streamed):
    """What vLLM's serving classes do with an error in a stream."""

    async def events(self, error: GenerationError, before: int) -> AsyncIterator[str]:
        try:
            for n in range(before):
                yield f'data: {{"id": "{n}"}}\n\n'
            raise error
        except GenerationError as e:
            yield f"data: {self._convert_generation_error_to_streaming_response(e)}\n\n"
        yield "data: [DONE]\n\n"


@pytest.mark.parametrize("kind", ENDINGS.values())
async def test_a_missing_delta_ends_the_call_with_its_reason(kind: type[Any]) -> None:
    async def fails(request: Any) -> Any:
        raise kind

    with pytest.raises(TenSafeError) as caught:
        await _answer(CompletionRequest, fails, {"prompt": "x"})
    assert caught.value.reason == kind.reason


@pytest.mark.parametrize("kind", ENDINGS.values())
@pytest.mark.parametrize("before", [0, 1, 2])
async def test_so_it_does_in_a_stream_without_done(kind: type[Any], before: int) -> None:
    received = []
    with pytest.raises(TenSafeError) as caught:
        answer = await _stream(Streaming().events(kind(), before))  # type: ignore[arg-type]
        async for piece in answer.body:
            received.append(piece)
    assert (caught.value.reason, len(received)) == (kind.reason, before)
    assert caught.value.message == kind().message
    assert not any(b"error" in piece or b"DONE" in piece for piece in received)


async def test_a_callers_mistake_is_an_openai_document() -> None:
    async def fails(request: Any) -> Any:
        raise InvalidInputError("what was wrong")

    answer = await _answer(CompletionRequest, fails, {"prompt": "x"})
    assert (answer.status, (await document(answer))["error"]["message"]) == (400, "what was wrong")


async def test_unexpected_errors_do_not_tell_what_they_were() -> None:
    answer = await error_answer(RuntimeError("the prompt was: secret"))
    assert answer.status == 500
    assert "secret" not in json.dumps(await document(answer))
    unavailable = await error_answer(UnavailableError("try later"))
    assert (unavailable.status, (await document(unavailable))["error"]["code"]) == (503, "unavailable")


async def test_a_stream_that_vllm_fails_first_has_a_status() -> None:
    closed = False

    async def events() -> AsyncIterator[str]:
        nonlocal closed
        try:
            yield 'data: {"error": {"message": "m", "type": "t", "param": null, "code": 503}}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            closed = True

    answer = await _stream(events())  # type: ignore[arg-type]
    assert (answer.status, answer.content_type, closed) == (503, "application/json", True)
    assert (await document(answer))["error"] == {"message": "m", "type": "server_error", "param": None, "code": None}


async def test_a_stream_that_vllm_fails_later_ends_with_the_error() -> None:
    async def events() -> AsyncIterator[str]:
        yield 'data: {"id": "1"}\n\n'
        yield 'data: {"error": {"message": "m", "code": 500}}\n\n'
        yield "data: [DONE]\n\n"

    answer = await _stream(events())  # type: ignore[arg-type]
    assert (answer.status, answer.content_type) == (200, "text/event-stream")
    assert [b"error" in piece async for piece in answer.body] == [False, True]
