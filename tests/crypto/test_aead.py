"""Part encryption: key separation, and that no plaintext appears before everything has verified."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.crypto.aead import CHUNK_BYTES, derive_key, open_part, seal_part
from tensorguard.errors import InvalidInputError
from tests.package.independent_reader import open_chunks

KEY = bytes(range(32))
LONG = bytes(3 * CHUNK_BYTES + 5)


@settings(max_examples=25)
@given(st.binary(max_size=200), st.integers(0, 2), st.binary(max_size=40))
def test_round_trip(tail: bytes, chunks: int, context: bytes) -> None:
    plaintext = bytes(chunks * CHUNK_BYTES) + tail
    assert open_part(KEY, context, seal_part(KEY, context, plaintext)) == plaintext


def test_hkdf_known_answer() -> None:
    # HKDF-SHA256 of the key 00..1f, no salt, info "tensafe", computed with hmac below as RFC 5869 describes.
    import hashlib
    import hmac

    pseudo_random_key = hmac.new(bytes(32), KEY, hashlib.sha256).digest()
    expected = hmac.new(pseudo_random_key, b"tensafe\x01", hashlib.sha256).digest()
    assert derive_key(KEY, b"tensafe") == expected


def test_parts_have_different_keys() -> None:
    sealed = seal_part(KEY, b"weights", b"secret")
    for key, context in ((KEY, b"basis"), (bytes(32), b"weights")):
        with pytest.raises(InvalidInputError):
            open_part(key, context, sealed)


@settings(max_examples=30)
@given(st.data())
def test_refuses_any_changed_byte(data: st.DataObject) -> None:
    sealed = bytearray(seal_part(KEY, b"c", LONG))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidInputError):
        open_part(KEY, b"c", bytes(sealed))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_is_what_the_specification_says(size: int) -> None:
    plaintext = bytes(number % 251 for number in range(size))
    sealed = seal_part(KEY, b"context", plaintext)
    assert open_chunks(derive_key(KEY, b"context"), b"context", sealed) == plaintext
    assert len(sealed) == 56 + size + 16 * (size // CHUNK_BYTES + 1)


def test_refuses_a_missing_end_and_reordered_chunks() -> None:
    sealed = seal_part(KEY, b"c", LONG)
    chunk = CHUNK_BYTES + 16
    header = len(sealed) - 3 * chunk - 5 - 16
    cut = sealed[: header + 2 * chunk]
    swapped = sealed[:header] + sealed[header + chunk : header + 2 * chunk] + sealed[header : header + chunk]
    for broken in (cut, sealed[:-1], swapped + sealed[header + 2 * chunk :], sealed + b"\0", b""):
        with pytest.raises(InvalidInputError):
            open_part(KEY, b"c", broken)


def test_refuses_a_content_key_of_another_length() -> None:
    with pytest.raises(InvalidInputError):
        seal_part(b"short", b"c", b"")
