"""HPKE (RFC 9180) with the hybrid KEM MLKEM768-X25519, HKDF-SHA256 and AES-256-GCM.

Single-shot base mode. There is no associated data: a caller binds all context through `info`, which must be
injective (canonical JSON or length-prefixed fields). A sealed message is the 1120-byte encapsulated key
followed by the ciphertext with its 16-byte tag.

Keys of our own are always hybrid. Sealing to DHKEM(X25519, HKDF-SHA256), with 32 bytes encapsulated, is for peers that
have no ML-KEM; whether there may be any is for the caller to ask (`suite_of`).
"""

from __future__ import annotations

from enum import Enum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from tensorguard.errors import InvalidInputError

PUBLIC_KEY_BYTES = 1184 + 32
PRIVATE_KEY_BYTES = 64 + 32
ENCAPSULATED_BYTES = 1088 + 32
OVERHEAD_BYTES = ENCAPSULATED_BYTES + 16

_MLKEM_PUBLIC_BYTES = 1184
_MLKEM_SEED_BYTES = 64
_X25519_PUBLIC_BYTES = 32


class HpkeSuite(str, Enum):
    """What something is sealed with, by its KEM; the rest is the same."""

    MLKEM768_X25519 = "MLKEM768-X25519"
    X25519 = "X25519"
    """Whoever records what is sealed with it opens it when there are quantum computers."""


def suite_of(public_key: bytes) -> HpkeSuite:
    """The suite that a public key is for, which its length says. Raises InvalidInputError."""
    if len(public_key) == PUBLIC_KEY_BYTES:
        return HpkeSuite.MLKEM768_X25519
    if len(public_key) == _X25519_PUBLIC_BYTES:
        return HpkeSuite.X25519
    raise InvalidInputError(
        f"an HPKE public key has {PUBLIC_KEY_BYTES} bytes (or {_X25519_PUBLIC_BYTES} for X25519 alone), "
        f"not {len(public_key)}"
    )


def seal(public_key: bytes, info: bytes, plaintext: bytes) -> bytes:
    """Encrypt `plaintext` to a public key: ML-KEM-768 encapsulation key, then X25519 key (1216 bytes), or X25519 alone.

    Raises InvalidInputError when the public key is malformed.
    """
    suite = suite_of(public_key)
    try:
        classical = x25519.X25519PublicKey.from_public_bytes(public_key[-_X25519_PUBLIC_BYTES:])
        if suite is HpkeSuite.X25519:
            return _suite(KEM.X25519).encrypt(plaintext, classical, info)
        key = MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_BYTES]), classical
        )
        return _suite(KEM.MLKEM768_X25519).encrypt(plaintext, key, info)
    except ValueError as error:
        raise InvalidInputError(f"the HPKE public key is not valid: {error}") from None


class HpkePrivateKey:
    """A recipient's key pair."""

    __slots__ = ("_key", "_mlkem", "_x25519")

    def __init__(self, mlkem_key: mlkem.MLKEM768PrivateKey, x25519_key: x25519.X25519PrivateKey) -> None:
        self._mlkem = mlkem_key
        self._x25519 = x25519_key
        self._key = MLKEM768X25519PrivateKey(mlkem_key, x25519_key)

    @classmethod
    def generate(cls) -> HpkePrivateKey:
        """A fresh key pair."""
        return cls(mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> HpkePrivateKey:
        """The inverse of `to_bytes`. Raises InvalidInputError for another length."""
        if len(data) != PRIVATE_KEY_BYTES:
            raise InvalidInputError(f"an HPKE private key has {PRIVATE_KEY_BYTES} bytes, not {len(data)}")
        return cls(
            mlkem.MLKEM768PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES]),
            x25519.X25519PrivateKey.from_private_bytes(data[_MLKEM_SEED_BYTES:]),
        )

    def to_bytes(self) -> bytes:
        """The ML-KEM seed (64 bytes) followed by the X25519 key (32 bytes). Secret."""
        return self._mlkem.private_bytes_raw() + self._x25519.private_bytes_raw()

    @property
    def public_bytes(self) -> bytes:
        """The public key as `seal` takes it."""
        return self._mlkem.public_key().public_bytes_raw() + self._x25519.public_key().public_bytes_raw()

    def open(self, info: bytes, sealed: bytes) -> bytes:
        """Decrypt what was sealed to this key under the same `info`.

        Raises InvalidInputError, without saying which, when key, info or bytes differ.
        """
        try:
            return _suite(KEM.MLKEM768_X25519).decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError):
            raise InvalidInputError("the sealed message does not open under this key and context") from None


def _suite(kem: KEM) -> Suite:
    return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
