"""JSON log lines (structlog) with redaction. Logs never carry prompts, activations, deltas, keys or tokens.

Redaction is a second line of defence: code does not put secrets into log events in the first place. The same step
bounds the size of every line, so that nobody fills a disk with one request.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "[redacted]"

_SENSITIVE = frozenset(
    {
        "api_key",
        "secret",
        "tssp_secret",
        "user_id",
        "authorization",
        "cookie",
        "set_cookie",
        "token",
        "password",
    }
    | {"credential", "credentials", "prompt", "messages", "content", "request_body", "signature", "seed"}
    | {
        "content_key",
        "private_key",
        "secret_key",
        "signing_key",
        "basis",
        "activation",
        "activations",
        "delta",
    }
)
# Secrets that come inside other text: JWTs, bearer headers, private keys in PEM.
_SECRET_TEXT = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]*\.?[\w-]*"
    r"|(?i:bearer)\s+[\w.~+/=-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END[^\n]*|\Z)",
    re.DOTALL,
)
# A line stays small whatever a caller put into its request: these bound every value of every line.
_LONGEST_TEXT = 200
_LONGEST_EVENT = 2000
"""The event itself is a constant in our code, but a whole message in lines of other libraries."""
_LONGEST_INTEGER_BITS = 128
_MOST_ITEMS = 32
_DEEPEST = 4


def is_sensitive(key: str) -> bool:
    """Whether a field's name says that its value is secret: `token` and `host_token`, not `tokens_left`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(".", "_")
    return name in _SENSITIVE or any(name.endswith(f"_{word}") for word in _SENSITIVE)


def redacted(value: Any, depth: int = 0, longest: int = _LONGEST_TEXT) -> Any:
    """A value as it may be logged: secrets masked, text, collections and numbers cut to a bounded size, bytes and
    objects replaced by their size or type.
    """
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        # Long ones cannot even be printed: Python refuses more than 4300 digits.
        return value if value.bit_length() <= _LONGEST_INTEGER_BITS else f"<integer of {value.bit_length()} bits>"
    if isinstance(value, (str, Path)):
        return _cut(str(value), longest)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if depth < _DEEPEST and isinstance(value, Mapping):
        kept = islice(value.items(), _MOST_ITEMS)
        document = {
            _cut(str(k), _LONGEST_TEXT): MASK if is_sensitive(str(k)) else redacted(v, depth + 1) for k, v in kept
        }
        return document | ({"…": f"{len(value) - _MOST_ITEMS} more"} if len(value) > _MOST_ITEMS else {})
    if depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
        items = [redacted(item, depth + 1) for item in islice(value, _MOST_ITEMS)]
        return items + ([f"… {len(value) - _MOST_ITEMS} more"] if len(value) > _MOST_ITEMS else [])
    return f"<{type(value).__name__}>"


def _cut(text: str, longest: int) -> str:
    """The beginning of `text` with secrets masked. Masking sees more than is kept, so that no secret is halved, and
    not everything, because it takes time that grows with the square of what a caller sends.
    """
    masked = _SECRET_TEXT.sub(MASK, text[: 2 * longest])
    return masked if len(masked) <= longest and len(text) <= 2 * longest else f"{masked[:longest]}…"


def frames_of(error: BaseException, limit: int = 12) -> list[str]:
    """`file:line function` of the newest frames of a traceback: no text of the exception, no arguments."""
    frames: list[str] = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return frames[-limit:]


def _redact(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    return {
        key: MASK if is_sensitive(key) else redacted(value, longest=_LONGEST_EVENT if key == "event" else _LONGEST_TEXT)
        for key, value in event.items()
    }


def _exception_without_text(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Replace `exc_info` by the exception's type and frames; its text may quote a value."""
    info = event.pop("exc_info", None)
    error = info if isinstance(info, BaseException) else info[1] if isinstance(info, tuple) else None
    if info is True:
        error = sys.exc_info()[1]
    if error is not None:
        event["error_type"] = type(error).__name__
        event["frames"] = frames_of(error)
    return event


def configure_logging(service: str, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's logs to `stream` (default: stdout) as redacted JSON."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_text,
    ]

    def add_service(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                add_service,
                _redact,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
