"""Which requests of one host key are evaluated: well-formed ones, whose ciphertext identifiers only grow."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import kernels
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.randomness import SEED_BYTES
from tensorguard.ckks.ring import Residues, ring
from tensorguard.errors import InvalidInputError

MAX_CIPHERTEXTS = 1 << 12
_COUNTER_BITS = 48


class Admission:
    """The checks every engine makes before it touches a ciphertext. Thread-safe."""

    def __init__(self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes) -> None:
        """Raises InvalidInputError for a malformed key: pk0 uint32 [primes, N] reduced, seed of 32 bytes."""
        if len(pk1_seed) != SEED_BYTES or not session_id:
            raise InvalidInputError("a session needs a 32-byte public-key seed and an identifier")
        self._parameters = parameters
        self._primes = ring(parameters).primes
        self._lock = threading.Lock()
        self._last_ids: dict[int, int] = {}
        self._check_residues(pk0[None], 1)

    def admit(self, d_in: int, plan: Plan, tokens: int, ids: npt.NDArray[np.uint64], seeds: bytes, b: Residues) -> None:
        """Raises InvalidInputError for arrays that do not fit the plan, unreduced residues and identifiers
        that were used before; otherwise these identifiers are used now.
        """
        count = plan.uploads(tokens, d_in) if tokens >= 1 else 0
        if not 1 <= count <= MAX_CIPHERTEXTS:
            raise InvalidInputError(f"a request has 1 to {MAX_CIPHERTEXTS} ciphertexts")
        if ids.dtype != np.uint64 or ids.shape != (count,) or len(seeds) != SEED_BYTES * count:
            raise InvalidInputError(f"expected {count} ciphertext identifiers and seeds")
        self._check_residues(b, count)
        self._take_ids(ids)

    def _check_residues(self, polynomials: Residues, count: int) -> None:
        shape = (count, len(self._primes), self._parameters.degree)
        if polynomials.dtype != np.uint32 or polynomials.shape != shape:
            raise InvalidInputError(f"expected {count} polynomials of uint32 residues {list(shape[1:])}")
        if not kernels.all_reduced(np.ascontiguousarray(polynomials), self._primes):
            raise InvalidInputError("a residue is not below its prime")

    def _take_ids(self, ids: npt.NDArray[np.uint64]) -> None:
        """Refuse identifiers that do not grow per worker (its number is in the high 16 bits); remember the
        last.
        """
        values = ids.tolist()
        with self._lock:
            last = dict(self._last_ids)
            for value in values:
                worker = value >> _COUNTER_BITS
                if value <= last.get(worker, 0):
                    raise InvalidInputError("a ciphertext identifier was used before")
                last[worker] = value
            self._last_ids = last
