"""Deterministic public expansion and one-time secret streams, both ChaCha20 (RFC 8439).

Public: K = SHA3-256(label ‖ parameter set ‖ session ‖ identifier ‖ seed), text fields length-prefixed; the
residues of prime i come from ChaCha20(K, counter 0, nonce i). Every secret stream has a key of its own from
the operating system and a label, so that no public value ever reaches it.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from tensorguard.ckks import kernels
from tensorguard.ckks.arrays import aligned_empty, scratch
from tensorguard.ckks.parallel import split
from tensorguard.ckks.parameters import ParameterSet

SEED_BYTES = 32
_CIPHERTEXT_LABEL = b"tensafe/ckks/v1/ciphertext"
_PUBLIC_KEY_LABEL = b"tensafe/ckks/v1/public-key"
_SECRET_LABEL = b"tensafe/ckks/v1/secret/"
_ZEROS = memoryview(bytes(1 << 15))
"""Little enough to stay in the cache."""


class _KeyStream(Protocol):
    def update_into(self, data: Any, buf: Any) -> int: ...


def _chacha20(key: bytes) -> _KeyStream:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _fill(stream: _KeyStream, target: memoryview) -> None:
    size = len(target)
    for start in range(0, size, len(_ZEROS)):
        part = target[start : start + len(_ZEROS)]
        stream.update_into(_ZEROS[: len(part)], part)


class UniformExpander:
    """Expands seeds to uniform ring elements in the transform domain. Both sides run it on public values."""

    def __init__(self, parameters: ParameterSet, session_id: bytes, *, public_key: bool = False) -> None:
        label = _PUBLIC_KEY_LABEL if public_key else _CIPHERTEXT_LABEL
        fields = (label, parameters.name.encode(), session_id)
        self._prefix = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
        self._primes = np.array(parameters.primes, np.uint32)
        self._degree = parameters.degree

    def keys(self, identifiers: list[int], seeds: bytes) -> npt.NDArray[np.uint32]:
        """The ChaCha20 keys uint32 [C, 8] of C 64-bit identifiers and C concatenated 32-byte seeds."""
        digests = [
            hashlib.sha3_256(
                self._prefix + identifier.to_bytes(8, "little") + seeds[SEED_BYTES * index : SEED_BYTES * (index + 1)]
            ).digest()
            for index, identifier in enumerate(identifiers)
        ]
        return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 8)

    def expand(
        self, identifiers: list[int], seeds: bytes, target: npt.NDArray[np.uint32] | None = None, threads: int = 1
    ) -> npt.NDArray[np.uint32]:
        """uint32 [C, primes, N] for C 64-bit identifiers and C concatenated 32-byte seeds, in ``target`` if given."""
        return self.expand_keys(self.keys(identifiers, seeds), target, threads)

    def expand_keys(
        self, keys: npt.NDArray[np.uint32], target: npt.NDArray[np.uint32] | None = None, threads: int = 1
    ) -> npt.NDArray[np.uint32]:
        """The same, from `keys`."""
        residues = aligned_empty(len(keys), len(self._primes), self._degree) if target is None else target
        split(
            threads,
            len(keys),
            lambda first, end: kernels.expand(
                keys[first:end], self._primes, scratch.take("expansion", 256), residues[first:end]
            ),
        )
        return residues


class SecretStream:
    """A fresh random stream, keyed by the operating system and used for one purpose."""

    def __init__(self, purpose: str) -> None:
        key = hashlib.sha3_256(_SECRET_LABEL + purpose.encode() + b"\0" + os.urandom(32)).digest()
        self._stream = _chacha20(key)

    def __repr__(self) -> str:
        return "SecretStream()"

    def words(self, *shape: int, kept_for: str | None = None) -> npt.NDArray[np.uint64]:
        """Uniform uint64 of this shape, in the scratch array kept for a use if one is named (see `arrays.Scratch`)."""
        result: npt.NDArray[np.uint64]
        if kept_for is None:
            result = np.empty(shape, "<u8")
        else:
            result = scratch.take(kept_for, 2 * math.prod(shape)).view("<u8").reshape(shape)
        if result.size:
            _fill(self._stream, result.reshape(-1).data.cast("B"))
        return result

    def ternary(self, count: int, degree: int) -> npt.NDArray[np.uint8]:
        """uint8 [count, degree], uniform on 0, 1, 2 (that is, ternary plus one)."""
        trits = np.empty((count, degree), np.uint8)
        accepted = np.empty(degree // 4, np.uint8)
        drawn = self.words(count, degree // 32).view(np.uint8)
        done = 0
        # N / 4 bytes hold the N / 5 groups of digits that are needed except with probability below 2**-200.
        while (done := done + int(kernels.accept_ternary(drawn[done:], accepted, trits[done:]))) < count:
            drawn[done] = self.words(degree // 32).view(np.uint8)
        return trits
