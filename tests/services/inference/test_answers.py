"""OpenAI's JSON in and out, without an engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.answers import RESERVED_FIELDS, _stream, error_answer, parse_body
from tensorguard.backends.vllm.failures import DeltaUnavailable
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


async def test_a_missing_delta_is_a_503_that_says_so() -> None:
    answer = await error_answer(DeltaUnavailable())
    assert answer.status == 503
    error = (await document(answer))["error"]
    assert (error["type"], error["code"]) == ("server_error", "delta_unavailable")


async def test_unexpected_errors_do_not_tell_what_they_were() -> None:
    answer = await error_answer(RuntimeError("the prompt was: secret"))
    assert answer.status == 500
    assert "secret" not in json.dumps(await document(answer))
    unavailable = await error_answer(UnavailableError("try later"))
    assert (unavailable.status, (await document(unavailable))["error"]["code"]) == (503, "unavailable")


async def test_a_stream_that_fails_first_has_a_status() -> None:
    closed = False

    async def events() -> AsyncIterator[str]:
        nonlocal closed
        try:
            yield 'data: {"error": {"message": "m", "type": "t", "param": null, "code": "delta_unavailable"}}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            closed = True

    answer = await _stream(events())  # type: ignore[arg-type]
    assert (answer.status, answer.content_type, closed) == (503, "application/json", True)
    assert (await document(answer))["error"]["code"] == "delta_unavailable"


async def test_a_stream_that_fails_later_ends_with_the_error() -> None:
    async def events() -> AsyncIterator[str]:
        yield 'data: {"id": "1"}\n\n'
        yield 'data: {"error": {"code": "delta_unavailable"}}\n\n'
        yield "data: [DONE]\n\n"

    answer = await _stream(events())  # type: ignore[arg-type]
    assert (answer.status, answer.content_type) == (200, "text/event-stream")
    assert [b"error" in piece async for piece in answer.body] == [False, True]
