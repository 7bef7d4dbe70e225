"""Integer adapter weights of a group, and their transforms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import kernels
from tensorguard.ckks.arrays import aligned_empty
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import MAX_CHANNELS, MAX_ROWS, Plan
from tensorguard.ckks.products import SEGMENT
from tensorguard.ckks.ring import Residues, ring
from tensorguard.errors import InvalidInputError, NotFoundError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GroupWeights:
    """Fixed-point weights of the projections that share an input: ``A'[j] ≈ integers[j] *
    2.0**-scale_exponents[j]``.

    integers int32 [rows, d_in]; scale_exponents one int per row; norm_bound the public bound on the Frobenius
    norm of each projection's integers, so on each row's norm. Raises InvalidInputError if a row exceeds it.
    """

    integers: npt.NDArray[np.int32]
    scale_exponents: tuple[int, ...]
    norm_bound: float

    def __post_init__(self) -> None:
        if self.integers.ndim != 2 or self.integers.dtype != np.int32:
            raise InvalidInputError("group weights must be an int32 array [rows, d_in]")
        rows, d_in = self.integers.shape
        if not (1 <= rows <= MAX_ROWS and 1 <= d_in <= MAX_CHANNELS):
            raise InvalidInputError(f"a group has 1 to {MAX_ROWS} rows and 1 to {MAX_CHANNELS} channels")
        if len(self.scale_exponents) != rows:
            raise InvalidInputError(f"{len(self.scale_exponents)} scale exponents for {rows} rows")
        if not np.all(np.linalg.norm(self.integers.astype(np.float64), axis=1) <= self.norm_bound):
            raise InvalidInputError("a row of the group's weights exceeds its norm bound")

    @property
    def rows(self) -> int:
        return int(self.integers.shape[0])

    @property
    def d_in(self) -> int:
        return int(self.integers.shape[1])

    @property
    def row_scales(self) -> npt.NDArray[np.float64]:
        """float64 [rows]: what an integer product is multiplied with."""
        return np.exp2(-np.asarray(self.scale_exponents, np.float64))

    def __repr__(self) -> str:
        return f"GroupWeights(rows={self.rows}, d_in={self.d_in})"


class EncodedGroup:
    """A group's weights transformed once for every plan it may be evaluated with; nothing else can be
    evaluated.
    """

    def __init__(self, weights: GroupWeights, parameters: ParameterSet, plans: Iterable[Plan]) -> None:
        self.plans = frozenset(plans)
        for plan in self.plans:
            plan.check(parameters)
        self.rows, self.d_in = weights.rows, weights.d_in
        self.parameters = parameters
        self._encoded = {plan: _encode(weights.integers, parameters, plan) for plan in sorted(self.plans)}

    def __repr__(self) -> str:
        plans = sorted(plan.identifier for plan in self.plans)
        return f"EncodedGroup(rows={self.rows}, d_in={self.d_in}, plans={plans})"

    @property
    def nbytes(self) -> int:
        """Bytes of transformed weights held."""
        return sum(encoded.nbytes for encoded in self._encoded.values())

    def encoded(self, plan: Plan) -> Residues:
        """As `kernels.encode_weights` lays them out. Raises NotFoundError for a plan that was not compiled."""
        try:
            return self._encoded[plan]
        except KeyError:
            raise NotFoundError(f"plan {plan.identifier} is not one this adapter was packaged with") from None


def _encode(integers: npt.NDArray[np.int32], parameters: ParameterSet, plan: Plan) -> Residues:
    constants = ring(parameters)
    rows, d_in = integers.shape
    shape = (
        len(parameters.primes),
        parameters.degree // SEGMENT // plan.tokens,
        plan.row_groups(rows),
        plan.blocks(d_in),
        SEGMENT,
    )
    encoded = aligned_empty(*shape)
    scratch, transformed = aligned_empty(2, parameters.degree)
    kernels.encode_weights(
        np.ascontiguousarray(integers),
        plan.shape,
        encoded,
        scratch,
        transformed,
        constants.constants,
        constants.factors,
        constants.primes,
    )
    encoded.flags.writeable = False
    return encoded
