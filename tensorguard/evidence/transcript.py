"""One unambiguous byte string for a list of fields under a domain tag, to hash, sign or seal to."""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

Field: TypeAlias = "bytes | str | int"

ATTEST: Final = "tssp-attest/v1"
RELEASE: Final = "tssp-release/v1"
RENEW: Final = "tssp-renew/v1"
GPU_NONCE: Final = "tssp-gpu-nonce/v1"
SEALED_KEY: Final = "tssp-sealed-key/v1"
WATCH: Final = "tssp-watch/v1"


def encode(domain: str, *fields: Field) -> bytes:
    """Domain tag and fields, each prefixed by its length (4 bytes, big endian).

    Text is UTF-8, an integer is 8 bytes big endian. Two different lists never encode to the same bytes within
    a domain whose fields have fixed types and a fixed number.
    """
    parts: list[bytes] = []
    for field in (domain, *fields):
        if isinstance(field, int):
            data = struct.pack(">Q", field)
        elif isinstance(field, str):
            data = field.encode("utf-8")
        else:
            data = bytes(field)
        parts.append(struct.pack(">I", len(data)) + data)
    return b"".join(parts)
