"""Write tests/session/vectors/frames.json: `python -m tests.session.make_vectors`.

Written with Python integers and `struct` from docs/protocol-session.md alone; nothing of the engine is used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "vectors" / "frames.json"
DEGREE = 4096
PRIMES = (1073692673, 1073668097, 1073651713)


def residue(index: int, n: int, prime: int) -> int:
    """Residue n of polynomial `index` of an array: a rule instead of 46 KiB."""
    return (n * n * 31 + 1_000_003 * n * (index + 1) + 7 * index) % prime


def pack(v: list[int]) -> bytes:
    m = len(v) // 16
    words = (v[k * m + j] | ((v[15 * m + j] >> 2 * k) & 3) << 30 for k in range(15) for j in range(m))
    return b"".join(struct.pack("<I", word) for word in words)


def message(header: bytes, body: bytes) -> bytes:
    """Padded so that the body begins at a multiple of eight bytes of the message; byte 2 of a header is the padding."""
    padding = 0
    for _ in range(2):
        padding = -(len(varint(len(header) + padding + len(body))) + 1 + len(header)) % 8 if body else 0
    header = header[:2] + bytes([padding]) + header[3:]
    frame = header + bytes(padding) + body
    return b"\x0a" + varint(len(frame)) + frame


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def summary(name: str, made: bytes, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "fields": fields,
        "bytes": len(made),
        "begins": made[:96].hex(),
        "sha256": hashlib.sha256(made).hexdigest(),
    }


def request() -> dict[str, Any]:
    ids, seeds = [1, 2**48 + 5], bytes(range(64))
    fields = {
        "group": 3,
        "layer": 29,
        "plan": [8, 64, 8],
        "adapter_handle": 3,
        "key_number": 2,
        "tokens": 5,
        "request_id": 7,
        "ids": ids,
        "seeds": seeds.hex(),
    }
    header = struct.pack("<BBBBHHHHIIIIQ", 3, 1, 0, 3, 29, 8, 64, 8, 3, 2, 5, len(ids), 7)
    polynomials = [
        [residue(3 * c + i, n, prime) for n in range(DEGREE)] for c in range(len(ids)) for i, prime in enumerate(PRIMES)
    ]
    body = b"".join(struct.pack("<Q", name) for name in ids) + seeds + b"".join(map(pack, polynomials))
    return summary("request", message(header, body), **fields)


def response() -> dict[str, Any]:
    counts = [27, 12, 15, 3, 3, 0, 0, 0]
    fields = {"responses": 3, "tokens": 2, "rows": 20, "request_id": 7, "evaluate_ns": 123456789, "counts": counts}
    header = struct.pack("<BBBBIIIQQ8I", 3, 2, 0, 0, 3, 2, 20, 7, 123456789, *counts)
    c1 = [[residue(d, n, PRIMES[0]) for n in range(DEGREE)] for d in range(3)]
    c0 = [residue(9, n, PRIMES[0]) for n in range(2 * 20)]
    body = b"".join(map(pack, c1)) + b"".join(struct.pack("<I", value) for value in c0)
    return summary("response", message(header, body), **fields)


def request_by_reference() -> dict[str, Any]:
    header = struct.pack("<BBBBHHHHIIIIQ", 3, 4, 0, 1, 0, 1, 288, 12, 0, 0, 1, 2, 8)
    frame = header + struct.pack("<QQ", 8192, 94208)
    made = b"\x0a" + varint(len(frame)) + frame
    return {"name": "request by reference", "offset": 8192, "length": 94208, "message": made.hex()}


def failures() -> list[dict[str, Any]]:
    return [
        {
            "name": "failure",
            "request_id": 258,
            "code": code,
            "message": message(struct.pack("<BBBBIQ", 3, 3, 0, code, 0, 258), b"").hex(),
        }
        for code in (1, 2, 3)
    ]


def packing() -> dict[str, Any]:
    residues = [residue(0, n, PRIMES[0]) for n in range(64)]
    return {"residues": residues, "packed": pack(residues).hex()}


def vectors() -> dict[str, Any]:
    return {
        "parameters": "n4096-q90-w12",
        "residue": "(31 n^2 + 1000003 n (k+1) + 7 k) mod p; k = 3c+i in b [c][i], d in c1 [d], 9 in c0 (n = t R + j)",
        "packing": packing(),
        "request": request(),
        "response": response(),
        "request_by_reference": request_by_reference(),
        "failures": failures(),
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
