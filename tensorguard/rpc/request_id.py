"""Request ids: taken from the caller's metadata or created, carried in structlog's context variables."""

from __future__ import annotations

import re
import secrets

import structlog

REQUEST_ID_KEY = "x-request-id"
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_request_id() -> str:
    """A fresh random id (96 bits, hex)."""
    return secrets.token_hex(12)


def accepted_request_id(value: str | bytes | None) -> str:
    """The caller's id if it is short and harmless in a log line, else a new one."""
    if isinstance(value, str) and _ACCEPTED.fullmatch(value):
        return value
    return new_request_id()


def current_request_id() -> str:
    """The id bound to the running request, or a new one."""
    return accepted_request_id(structlog.contextvars.get_contextvars().get("request_id"))
