from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.evidence import transcript
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.report_data import report_data

IDENTITY = PublicIdentity(b"\x04" * 65, b"h" * 1216)
FIELDS: dict[str, Any] = {
    "nonce": b"n" * 32,
    "identity": IDENTITY,
    "attestor_thumbprint": "thumb",
    "tenant": "tenant",
    "role": Role.COPROCESSOR,
    "package_id": "package",
    "tls_key": b"tls",
}


def test_known_vector() -> None:
    # Written out by hand from docs/attestation.md.
    fields = [b"tssp-attest/v1", b"n" * 32, b"\x04" * 65, b"h" * 1216, b"tls", b"thumb", b"tenant"]
    fields += [b"coprocessor", b"package"]
    data = b"".join(struct.pack(">I", len(field)) + field for field in fields)
    assert report_data(**FIELDS) == hashlib.sha512(data).digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonce", b"N" * 32),
        ("identity", PublicIdentity(b"\x05" * 65, b"h" * 1216)),
        ("identity", PublicIdentity(b"\x04" * 65, b"H" * 1216)),
        ("attestor_thumbprint", "other"),
        ("tenant", "other"),
        ("role", Role.INFERENCE),
        ("package_id", "other"),
        ("tls_key", b""),
    ],
)
def test_every_field_is_bound(name: str, value: object) -> None:
    assert report_data(**{**FIELDS, name: value}) != report_data(**FIELDS)


@given(st.lists(st.binary(max_size=6), min_size=2, max_size=5), st.data())
def test_field_borders_are_bound(fields: list[bytes], data: st.DataObject) -> None:
    joined = b"".join(fields)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), min_size=len(fields) - 1, max_size=len(fields) - 1)))
    other = [joined[a:b] for a, b in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    assert (transcript.encode("d", *other) == transcript.encode("d", *fields)) == (other == fields)
