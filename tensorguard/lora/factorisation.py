"""Factored mode: an adapter module s*B*A as U @ A' with U a uniformly random basis of its column space.

The inference host learns U and, per token, z = A'x; any r independent deltas would tell it as much
(docs/protocol.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from tensorguard.lora.adapter import Float32Array, LoraModule
from tensorguard.lora.randomness import Float64Array, RandomBytes, haar_orthogonal, random_complement

# Singular values below this share of the largest one are rounding errors of training, not directions.
RELATIVE_CUTOFF = 2.0**-30


@dataclass(frozen=True, slots=True, eq=False)
class FactoredProjection:
    """delta = u @ (weights @ x)."""

    u: Float32Array
    """float32 [d_out, rank], columns orthonormal up to the rounding to float32."""
    weights: Float64Array
    """A', float64 [rank, d_in]. Secret."""
    effective_rank: int
    """Singular values above the cut-off; 0 for a module that changes nothing."""

    @property
    def rank(self) -> int:
        """Rows of A'."""
        return int(self.weights.shape[0])

    @property
    def d_in(self) -> int:
        """Input channels."""
        return int(self.weights.shape[1])

    @property
    def d_out(self) -> int:
        """Output channels."""
        return int(self.u.shape[0])


def factor(module: LoraModule, random_bytes: RandomBytes = os.urandom) -> FactoredProjection:
    """Factor one module. Draw once per adapter version and projection, never twice.

    The rank of the result is min(rank, d_out): a basis has no more columns than the space has dimensions.
    Weights are the least-squares ones for the rounded U, (U^T U)^-1 U^T s*B*A: U is orthonormal only to
    float32.
    """
    b, a = module.B.astype(np.float64), module.A.astype(np.float64) * module.scaling
    # s*B*A = Q_b (R_b R_a^T) Q_a^T: the singular vectors come from an r x r matrix.
    q_b, r_b = np.linalg.qr(b)
    _, r_a = np.linalg.qr(a.T)
    left, values, _ = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = int(np.count_nonzero(values > RELATIVE_CUTOFF * values[0])) if values[0] > 0 else 0
    rank = min(module.rank, module.d_out)
    basis = q_b @ left[:, :kept]
    if kept < rank:
        # Padding from the whole complement: directions inside B's own range would show what B was.
        basis = np.hstack([basis, random_complement(basis, rank - kept, random_bytes)])
    u = (basis @ haar_orthogonal(rank, random_bytes)).astype(np.float32)
    rounded = u.astype(np.float64)
    weights = np.linalg.solve(rounded.T @ rounded, (rounded.T @ b) @ a)
    return FactoredProjection(u=u, weights=weights, effective_rank=kept)
