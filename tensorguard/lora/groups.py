"""Groups of projections that share an input, and their weights as integers.

The inner products of one group are computed in one call, so its rows are stacked. Each projection has one
public power-of-two scale; what that scale tells is the size of its weights to a factor of two, and nothing
else is told.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from tensorguard.errors import PrivacyBoundError, UnsupportedAdapterError
from tensorguard.lora.adapter import Float32Array, LoraModule, ModuleKey
from tensorguard.lora.factorisation import factor
from tensorguard.lora.full import SCALE_RANK, FullProjection
from tensorguard.lora.randomness import Float64Array, RandomBytes

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections by the fused layer they belong to, in the order in which vLLM fuses them."""

ERROR_BOUND = 2.0**-9
"""Worst-case error of z relative to |x| * |A'|_F / sqrt(d_in)."""
_TAIL = 6.0
"""The norm of a Gaussian vector with r entries of deviation 1 exceeds sqrt(r) + 6 with probability below 2^-25
(Laurent and Massart, "Adaptive estimation of a quadratic functional", 2000, lemma 1)."""

MAX_SCALE_EXPONENT = 512

Mode = Literal["factored", "full"]
"""What the inference host learns: a random basis U and z, or deltas alone (`factorisation`, `full`)."""

Int32Array = np.ndarray[Any, np.dtype[np.int32]]
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class WeightParameters(Protocol):
    """What rounding needs of a `tensorguard.ckks` parameter set."""

    @property
    def name(self) -> str: ...

    def norm_bound(self, d_in: int, largest_rank: int) -> float: ...

    def noise(self, norm_bound: float) -> float: ...


class SplitProjection(Protocol):
    """A module as it is sealed: delta = u @ (weights @ x), or weights @ x where there is no u."""

    @property
    def weights(self) -> Float64Array: ...

    @property
    def u(self) -> Float32Array | None: ...

    @property
    def rank(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ProjectionInfo:
    """Where a projection's rows are in its group, and their scale: A' = integers * 2**-scale_exponent."""

    name: str
    rank: int
    d_out: int
    row_offset: int
    scale_exponent: int


@dataclass(frozen=True, slots=True, eq=False)
class RoundedGroup:
    """One group of one layer. `integers` is secret; `u` is for the inference host only."""

    layer: int
    group: str
    d_in: int
    projections: tuple[ProjectionInfo, ...]
    integers: Int32Array
    """int32 [rows, d_in]"""
    norm_bound: float
    """Public bound on the norm of every row of integers: 2^w * sqrt(d_in * `scale_rank`)."""
    u: Mapping[str, Float32Array]
    """float32 [d_out, rank] by projection name; empty in full mode."""
    error: float
    """Of z, by the rounding of the weights and by encryption, worst case over projections and inputs, relative to
    |x| * |A'|_F / sqrt(d_in). Not to be published."""

    @property
    def rows(self) -> int:
        """Rows of all projections."""
        return int(self.integers.shape[0])


def build_group(
    layer: int,
    group: str,
    modules: Mapping[ModuleKey, LoraModule],
    parameters: WeightParameters,
    random_bytes: RandomBytes = os.urandom,
    mode: Mode = "factored",
) -> RoundedGroup:
    """Factor and round the projections of one group that `modules` has.

    Raises PrivacyBoundError when rounding at this parameter set's weight bits would miss the error bound, and
    UnsupportedAdapterError when the projections do not share an input.
    """
    split = split_group(layer, group, modules, random_bytes, mode)
    result = round_group(layer, group, split, parameters, mode)
    _check_error(result, parameters)
    return result


def build_groups(
    modules: Mapping[ModuleKey, LoraModule],
    parameter_sets: Sequence[WeightParameters],
    progress: Progress | None = None,
    random_bytes: RandomBytes = os.urandom,
    mode: Mode = "factored",
) -> tuple[WeightParameters, tuple[RoundedGroup, ...]]:
    """All groups under the first of `parameter_sets` (in rising weight bits) that keeps the error bound.

    Every projection is factored once, whatever the number of sets tried. Raises PrivacyBoundError when none
    suffices.
    """
    keys = group_keys(modules)
    split = []
    for done, (layer, group) in enumerate(keys):
        if progress is not None:
            progress(done, len(keys))
        split.append(split_group(layer, group, modules, random_bytes, mode))
    if progress is not None:
        progress(len(keys), len(keys))
    for parameters in parameter_sets:
        groups = tuple(round_group(*key, members, parameters, mode) for key, members in zip(keys, split, strict=True))
        worst = max(groups, key=lambda group: group.error)
        if worst.error <= ERROR_BOUND:
            return parameters, groups
    _check_error(worst, parameters)
    raise AssertionError("unreachable: the worst group is over the bound")


def group_keys(modules: Mapping[ModuleKey, LoraModule]) -> list[tuple[int, str]]:
    """(layer, group) of every group that has a module, layer by layer in the order of `GROUPS`."""
    layers = sorted({layer for layer, _ in modules})
    return [
        (layer, group)
        for layer in layers
        for group, projections in GROUPS.items()
        if any((layer, projection) in modules for projection in projections)
    ]


def split_group(
    layer: int,
    group: str,
    modules: Mapping[ModuleKey, LoraModule],
    random_bytes: RandomBytes = os.urandom,
    mode: Mode = "factored",
) -> dict[str, SplitProjection]:
    """The projections of one group, factored or whole, in the order of `GROUPS`."""
    present = [name for name in GROUPS[group] if (layer, name) in modules]
    if len({modules[layer, name].d_in for name in present}) != 1:
        raise UnsupportedAdapterError(f"the {group} projections of layer {layer} have no or different input sizes")
    if mode == "full":
        return {name: FullProjection(modules[layer, name]) for name in present}
    return {name: factor(modules[layer, name], random_bytes) for name in present}


def scale_rank(mode: Mode, largest_rank: int) -> int:
    """The rank whose norm bound, 2^w * sqrt(d_in * rank), a group's scale of encryption is made for."""
    return min(largest_rank, SCALE_RANK) if mode == "full" else largest_rank


def round_group(
    layer: int,
    group: str,
    split: Mapping[str, SplitProjection],
    parameters: WeightParameters,
    mode: Mode = "factored",
) -> RoundedGroup:
    """Stack the projections' weights as integers. The error is reported, not judged."""
    d_in = next(iter(split.values())).d_in
    norm_bound = parameters.norm_bound(d_in, scale_rank(mode, max(projection.rank for projection in split.values())))
    infos, rows, errors, offset = [], [], [], 0
    for name, projection in split.items():
        weights = projection.weights
        integers, exponent = round_weights(weights, parameters.norm_bound(d_in, projection.rank), norm_bound)
        infos.append(
            ProjectionInfo(
                name=name,
                rank=projection.rank,
                d_out=projection.d_out,
                row_offset=offset,
                scale_exponent=exponent,
            )
        )
        rows.append(integers)
        errors.append(
            relative_rounding_error(weights, integers, exponent)
            + relative_encryption_error(integers, parameters.noise(norm_bound))
        )
        offset += projection.rank
    return RoundedGroup(
        layer=layer,
        group=group,
        d_in=d_in,
        projections=tuple(infos),
        integers=np.vstack(rows),
        norm_bound=norm_bound,
        u={name: projection.u for name, projection in split.items() if projection.u is not None},
        error=max(errors),
    )


def round_weights(weights: Float64Array, norm_bound: float, row_bound: float = math.inf) -> tuple[Int32Array, int]:
    """round(weights * 2**k) with the largest k whose Frobenius norm and longest row are within their bounds, as
    int32, and k.

    All-zero weights get k = 0.
    """
    norm = float(np.linalg.norm(weights))
    if norm == 0.0:
        return np.zeros(weights.shape, dtype=np.int32), 0
    exponent = math.floor(math.log2(norm_bound / norm)) + 1
    rounded = np.rint(np.ldexp(weights, exponent))
    while np.linalg.norm(rounded) > norm_bound or np.linalg.norm(rounded, axis=1).max() > row_bound:
        exponent -= 1
        rounded = np.rint(np.ldexp(weights, exponent))
    if abs(exponent) > MAX_SCALE_EXPONENT:
        raise UnsupportedAdapterError(f"a projection's weights have norm {norm:.1e}, which has no usable scale")
    return rounded.astype(np.int32), exponent


def relative_rounding_error(weights: Float64Array, integers: Int32Array, exponent: int) -> float:
    """Largest |E x| / (|x| |weights|_F / sqrt(d_in)) over all x, E being the weights' rounding error.

    The maximum is at x along E's leading right singular vector, so the numerator is E's spectral norm.
    """
    norm = float(np.linalg.norm(weights))
    if norm == 0.0:
        return 0.0
    error = weights - np.ldexp(integers.astype(np.float64), -exponent)
    # The largest eigenvalue of the smaller Gram matrix: full mode's matrices are too large for singular values.
    error /= norm
    gram = error @ error.T if error.shape[0] <= error.shape[1] else error.T @ error
    spectral = math.sqrt(max(float(np.linalg.eigvalsh(gram)[-1]), 0.0))
    return spectral * math.sqrt(weights.shape[1])


def relative_encryption_error(integers: Int32Array, noise: float) -> float:
    """Error of z by encryption, with `noise` the deviation of one row, relative as above; up to its far tail."""
    rank, d_in = integers.shape
    norm = float(np.linalg.norm(integers.astype(np.float64)))
    if norm == 0.0:
        return 0.0
    return noise * (math.sqrt(rank) + _TAIL) * math.sqrt(d_in) / norm


def _check_error(group: RoundedGroup, parameters: WeightParameters) -> None:
    if group.error > ERROR_BOUND:
        raise PrivacyBoundError(
            f"rounding layer {group.layer} {group.group} under {parameters.name} can err by "
            f"{group.error:.2e}, over the bound {ERROR_BOUND:.2e}: use a set with more weight bits"
        )
