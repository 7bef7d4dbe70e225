"""What tenants, packages and sequences may be called. Checked wherever such a name enters."""

from __future__ import annotations

import re

from tensorguard.errors import InvalidInputError

NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
# Canonical JSON keeps integers exact up to here in every language (RFC 8259, section 6).
MAX_SEQUENCE = 2**53 - 1

_NAME = re.compile(NAME_PATTERN.removesuffix("$") + r"\Z")


def check_name(value: str, what: str) -> str:
    """Return `value`, or raise InvalidInputError when it is no name for a tenant or a package."""
    if not isinstance(value, str) or not _NAME.match(value):
        raise InvalidInputError(
            f"{what} {value!r:.80} is not a valid name: use 1 to 64 lower-case letters, digits, '.', '_' or "
            "'-', beginning and ending with a letter or digit"
        )
    return value


def check_sequence(value: int) -> int:
    """Return `value`, or raise InvalidInputError when it is no package sequence number (1 to 2^53 - 1)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SEQUENCE:
        raise InvalidInputError(f"sequence {value!r:.40} is not an integer from 1 to 2^53 - 1")
    return value
