"""Deterministic public expansion and one-time secret streams, both ChaCha20 (RFC 8439).

Public: K = SHA3-256(label ‖ parameter set ‖ session ‖ identifier ‖ seed), text fields length-prefixed; the
residues of
prime i come from ChaCha20(K, counter 0, nonce i). Every secret stream has a key of its own from the
operating system and a label, so that no public value ever reaches it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from tensorguard.ckks import kernels
from tensorguard.ckks.parameters import ParameterSet

SEED_BYTES = 32
_SLACK_WORDS = 64
_CIPHERTEXT_LABEL = b"tensafe/ckks/v1/ciphertext"
_PUBLIC_KEY_LABEL = b"tensafe/ckks/v1/public-key"
_SECRET_LABEL = b"tensafe/ckks/v1/secret/"
_ZEROS = bytes(1 << 16)


class _KeyStream(Protocol):
    def update_into(self, data: Any, buf: Any) -> int: ...
    def reset_nonce(self, nonce: Any) -> None: ...


def _chacha20(key: bytes) -> _KeyStream:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _fill(stream: _KeyStream, target: memoryview) -> None:
    for start in range(0, len(target), len(_ZEROS)):
        part = target[start : start + len(_ZEROS)]
        stream.update_into(_ZEROS[: len(part)] if len(part) < len(_ZEROS) else _ZEROS, part)


class UniformExpander:
    """Expands seeds to uniform ring elements in the transform domain. Both sides run it on public values."""

    def __init__(self, parameters: ParameterSet, session_id: bytes, *, public_key: bool = False) -> None:
        label = _PUBLIC_KEY_LABEL if public_key else _CIPHERTEXT_LABEL
        fields = (label, parameters.name.encode(), session_id)
        self._prefix = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
        self._primes = [np.uint32(prime) for prime in parameters.primes]
        self._nonces = [
            bytes(4) + index.to_bytes(4, "little") + bytes(8) for index in range(len(self._primes))
        ]
        self._degree = parameters.degree

    def expand(self, identifier: int, seed: bytes, target: npt.NDArray[np.uint32]) -> None:
        """Fill ``target`` uint32 [primes, N] for this 64-bit identifier and 32-byte seed."""
        key = hashlib.sha3_256(self._prefix + identifier.to_bytes(8, "little") + seed).digest()
        stream = _chacha20(key)
        for index, prime in enumerate(self._primes):
            stream.reset_nonce(self._nonces[index])
            expand_prime(stream, prime, target[index])


def expand_prime(stream: _KeyStream, prime: np.uint32, target: npt.NDArray[np.uint32]) -> None:
    """Fill uint32 ``target`` by in-order rejection from the start of ``stream``, drawing more words while
    needed.
    """
    words = np.empty(len(target) + _SLACK_WORDS, "<u4")
    _fill(stream, words.data.cast("B"))
    while kernels.accept_residues(words, prime, target) < len(target):
        more = np.empty(len(target), "<u4")
        _fill(stream, more.data.cast("B"))
        words = np.concatenate([words, more])


class SecretStream:
    """A fresh random stream, keyed by the operating system and used for one purpose."""

    def __init__(self, purpose: str) -> None:
        key = hashlib.sha3_256(_SECRET_LABEL + purpose.encode() + b"\0" + os.urandom(32)).digest()
        self._stream = _chacha20(key)

    def __repr__(self) -> str:
        return "SecretStream()"

    def words(self, *shape: int) -> npt.NDArray[np.uint64]:
        """Uniform uint64 of this shape."""
        result = np.empty(shape, "<u8")
        if result.size:
            _fill(self._stream, result.data.cast("B"))
        return result

    def ternary(self, count: int, degree: int) -> npt.NDArray[np.uint8]:
        """uint8 [count, degree], uniform on 0, 1, 2 (that is, ternary plus one)."""
        trits = np.empty((count, degree), np.uint8)
        accepted = np.empty(1024, np.uint8)
        drawn = self.words(count, 128).view(np.uint8)
        for row in range(count):
            # 1,024 bytes hold the 820 groups of digits that are needed except with probability below 2**-200.
            while not kernels.accept_ternary(drawn[row], accepted, trits[row]):
                drawn[row] = self.words(128).view(np.uint8)
        return trits
