from __future__ import annotations

import io
import json
import logging
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


def test_long_text_is_cut() -> None:
    assert len(redacted("x" * 10_000)) == 2001
