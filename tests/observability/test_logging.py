from __future__ import annotations

import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from tensorguard.observability.logging import MASK, configure_logging, is_sensitive, redacted


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure_logging("test", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "tssp_secret",
        "user_id",
        "Authorization",
        "Cookie",
        "token",
        "host_token",
        "prompt",
        "content_key",
        "contentKey",
        "x-api-key",
        "openai.api_key",
        "private_key",
        "Set-Cookie",
    ],
)
def test_sensitive_keys(key: str) -> None:
    assert is_sensitive(key)


@pytest.mark.parametrize("key", ["tokens", "tokens_left", "token_count", "address", "key_number", "event"])
def test_harmless_keys(key: str) -> None:
    assert not is_sensitive(key)


def test_values_are_masked_at_any_depth(stream: io.StringIO) -> None:
    structlog.get_logger().info(
        "x",
        api_key="AAA",
        nested={"headers": [{"Authorization": "AAA"}]},
        raw=b"AAA",
        array=np.ones(3),
        count=3,
    )
    (line,) = lines(stream)
    assert "AAA" not in json.dumps(line)
    assert line["api_key"] == MASK and line["raw"] == "<3 bytes>" and line["array"] == "<ndarray>"
    assert line["count"] == 3 and line["service"] == "test" and line["event"] == "x"


def test_secrets_inside_text_are_masked(stream: io.StringIO) -> None:
    token = "eyJhbGciOiJFUzI1NiJ9.eyJhIjoxfQ.c2lnbmF0dXJl"
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQ\n-----END PRIVATE KEY-----"
    structlog.get_logger().info(f"got {token}", header=f"Bearer {token}", pem=pem)
    text = stream.getvalue()
    assert "eyJ" not in text and "MIIEvQ" not in text and text.count(MASK) == 3


def test_exceptions_lose_their_text(stream: io.StringIO) -> None:
    try:
        raise ValueError("secret-value")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed too")
    first, second = lines(stream)
    assert "secret-value" not in stream.getvalue()
    for line in (first, second):
        assert line["error_type"] == "ValueError" and "test_logging.py" in line["frames"][-1]


def test_standard_library_logs_join(stream: io.StringIO) -> None:
    logging.getLogger("library").warning("hello %s", "you")
    (line,) = lines(stream)
    assert line["event"] == "hello you" and line["level"] == "warning" and line["logger"] == "library"


def test_level() -> None:
    stream = io.StringIO()
    configure_logging("test", level="warning", stream=stream)
    structlog.get_logger("a").info("quiet")
    assert stream.getvalue() == ""


def test_a_line_is_small_whatever_a_caller_sent(stream: io.StringIO) -> None:
    structlog.get_logger().info(
        "x" * 100_000,
        text="x" * 100_000,
        mapping={f"{i}" + "k" * 10_000: "v" * 10_000 for i in range(1000)},
        items=["v" * 10_000] * 1000,
        deep=[[[[["v" * 10_000]]]]],
        path=Path("/" + "p" * 10_000),
    )
    logging.getLogger("library").warning("%s", "x" * 100_000)
    first, second = lines(stream)
    assert len(first["event"]) == len(second["event"]) == 2001
    assert len(first["text"]) == 201 and first["text"].endswith("…") and len(first["path"]) == 201
    assert len(first["mapping"]) == len(first["items"]) == 33
    assert (first["mapping"]["…"], first["items"][-1]) == ("968 more", "… 968 more")
    assert redacted(10**5000) == "<integer of 16610 bits>"
    assert max(map(len, stream.getvalue().splitlines())) < 25_000


def test_what_fits_is_not_changed() -> None:
    for value in ("x" * 200, 2**64, -(2**127), list(range(32)), {str(i): "x" for i in range(32)}, 1.5, True, None):
        assert redacted(value) == value


def test_a_secret_at_the_cut_is_masked() -> None:
    text = "x" * 190 + "eyJhbGciOiJFUzI1NiJ9.eyJhIjoxfQ.c2lnbmF0dXJl" + "x" * 10_000
    assert "eyJ" not in redacted(text)
    assert redacted({"k" * 300 + "_token": "AAA"}) == {"k" * 200 + "…": MASK}


def test_masking_takes_no_time_that_grows_with_the_square() -> None:
    started = time.perf_counter()
    redacted("eyJaaaaaaaa" * 100_000)
    assert time.perf_counter() - started < 1.0
