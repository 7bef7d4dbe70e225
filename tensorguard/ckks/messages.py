"""What travels between the two sides: a request's ciphertexts and a response's rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.plan import Plan
from tensorguard.ckks.ring import Residues


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EncryptedActivations:
    """A request. ``ids`` uint64 [C], ``seeds`` 32·C bytes and ``b`` uint32 [C, primes, N] are sent.

    ``norms`` float64 [T] and ``unit`` (the value of one residue step of a decrypted response) stay on the
    host, and so does ``alpha`` float64 [T - 1] of checked mode, where the last of T rows is the check row.
    """

    plan: Plan
    tokens: int
    ids: npt.NDArray[np.uint64]
    seeds: bytes
    b: Residues
    norms: npt.NDArray[np.float64]
    unit: float
    pooled: int = 0
    """How many of the ciphertexts, the last ones, were made from a pool."""
    alpha: npt.NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        return f"EncryptedActivations(plan={self.plan.identifier}, tokens={self.tokens})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EvaluatedRows:
    """A response modulo p0: ``c1`` uint32 [D, N] and, at the wanted coefficients only, ``c0`` uint32 [tokens,
    rows].
    """

    c1: Residues
    c0: Residues

    def __repr__(self) -> str:
        return f"EvaluatedRows(responses={len(self.c1)})"
