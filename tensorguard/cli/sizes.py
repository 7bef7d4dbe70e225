"""Byte counts as people write them."""

from __future__ import annotations

import re

from tensorguard.errors import InvalidInputError

_SIZE = re.compile(r"([1-9]\d{0,14})\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes of ``800M``, ``1G``, ``1GiB`` or ``4096``, by powers of 1024. Raises InvalidInputError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInputError(f"{text!r:.40} is not a size: write 800M, 1G or a number of bytes")
    return int(match[1]) << 10 * _POWERS[match[2].upper()]


def show_bytes(count: float) -> str:
    """``count`` with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
