"""HPKE wrapper: what opens, and that any other key, context or byte does not."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke as reference
from cryptography.hazmat.primitives.asymmetric import x25519

from tensorguard.crypto import hpke
from tensorguard.errors import InvalidInputError


@pytest.fixture(scope="module")
def key() -> hpke.HpkePrivateKey:
    return hpke.HpkePrivateKey.generate()


def test_opens_what_was_sealed(key: hpke.HpkePrivateKey) -> None:
    sealed = hpke.seal(key.public_bytes, b"context", b"content key")
    assert len(sealed) == len(b"content key") + hpke.OVERHEAD_BYTES
    assert key.open(b"context", sealed) == b"content key"


def test_sealing_is_randomised(key: hpke.HpkePrivateKey) -> None:
    assert hpke.seal(key.public_bytes, b"", b"x") != hpke.seal(key.public_bytes, b"", b"x")


def test_keys_have_stable_bytes(key: hpke.HpkePrivateKey) -> None:
    again = hpke.HpkePrivateKey.from_bytes(key.to_bytes())
    assert again.public_bytes == key.public_bytes
    assert len(key.public_bytes) == hpke.PUBLIC_KEY_BYTES
    assert again.open(b"c", hpke.seal(key.public_bytes, b"c", b"m")) == b"m"


def test_both_halves_of_the_key_matter(key: hpke.HpkePrivateKey) -> None:
    sealed = hpke.seal(key.public_bytes, b"c", b"m")
    secret, other = key.to_bytes(), hpke.HpkePrivateKey.generate().to_bytes()
    for mixed in (secret[:64] + other[64:], other[:64] + secret[64:]):
        with pytest.raises(InvalidInputError):
            hpke.HpkePrivateKey.from_bytes(mixed).open(b"c", sealed)


def test_refuses_other_context_and_any_changed_byte(key: hpke.HpkePrivateKey) -> None:
    sealed = hpke.seal(key.public_bytes, b"c", b"message")
    with pytest.raises(InvalidInputError):
        key.open(b"d", sealed)
    for position in (0, 500, hpke.ENCAPSULATED_BYTES - 1, hpke.ENCAPSULATED_BYTES, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(InvalidInputError):
            key.open(b"c", bytes(changed))
    for short in (b"", sealed[:100], sealed[:-1]):
        with pytest.raises(InvalidInputError):
            key.open(b"c", short)


def test_refuses_malformed_keys(key: hpke.HpkePrivateKey) -> None:
    with pytest.raises(InvalidInputError, match="1216"):
        hpke.seal(key.public_bytes[:-1], b"", b"")
    with pytest.raises(InvalidInputError, match="not valid"):
        hpke.seal(b"\xff" * hpke.PUBLIC_KEY_BYTES, b"", b"")  # coefficients beyond q
    with pytest.raises(InvalidInputError):
        hpke.seal(key.public_bytes[:1184] + bytes(32), b"", b"")  # a low-order X25519 point
    with pytest.raises(InvalidInputError):
        hpke.HpkePrivateKey.from_bytes(b"short")


def test_a_peer_without_ml_kem(key: hpke.HpkePrivateKey) -> None:
    """By the same library, but put together as the peer would."""
    peer = x25519.X25519PrivateKey.generate()
    public = peer.public_key().public_bytes_raw()
    assert hpke.suite_of(public) is hpke.HpkeSuite.X25519
    assert hpke.suite_of(key.public_bytes) is hpke.HpkeSuite.MLKEM768_X25519
    suite = reference.Suite(reference.KEM.X25519, reference.KDF.HKDF_SHA256, reference.AEAD.AES_256_GCM)
    sealed = hpke.seal(public, b"context", b"content key")
    assert suite.decrypt(sealed, peer, b"context") == b"content key"
    with pytest.raises(InvalidTag):
        suite.decrypt(sealed, peer, b"another")
    with pytest.raises(InvalidInputError):
        hpke.seal(bytes(32), b"", b"")  # a low-order point


def test_what_is_sealed_to_the_classical_half_does_not_open(key: hpke.HpkePrivateKey) -> None:
    """No downgrade: a hybrid key opens nothing that was sealed without ML-KEM."""
    with pytest.raises(InvalidInputError):
        key.open(b"c", hpke.seal(key.public_bytes[1184:], b"c", b"m"))
