"""The MOAI contract: what must hold for an adapter to be evaluated without rotations, exactly and privately.

Checked when a package is made, when its manifest is opened, and against the weights when they are decrypted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tensorguard.ckks.parameters import ParameterSet, get_parameter_set
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.planner import MAX_CHUNK_BYTES
from tensorguard.ckks.privacy import total_variation
from tensorguard.ckks.weights import GroupWeights
from tensorguard.errors import ConfigurationError, InvalidInputError, PackageError, PrivacyBoundError
from tensorguard.lora.groups import ERROR_BOUND, scale_rank
from tensorguard.package.manifest import Group, Manifest

DEFAULT_PRIVACY_BOUND_LOG2 = -20
"""Largest statistical distance (log2) over a release's whole token budget that is accepted by default."""

# log2 values are rounded up to integers when written; this is for floating point on another machine.
_TOLERANCE = 1e-6


def package_total_variation(
    parameters: ParameterSet,
    groups: Iterable[tuple[GroupWeights, tuple[Plan, ...]]],
    token_budget: int,
) -> float:
    """log2 of the statistical distance over all that `token_budget` tokens return, all groups together.

    Kullback-Leibler divergences of independent responses add, so the squares of the bounds do (Pinsker).
    """
    squares = sum(
        4.0 ** total_variation(parameters, weights, plans, token_budget * weights.rows) for weights, plans in groups
    )
    return 0.5 * math.log2(squares)


def check_contract(manifest: Manifest, privacy_bound_log2: int = DEFAULT_PRIVACY_BOUND_LOG2) -> ParameterSet:
    """Check what a manifest claims, and return its parameter set.

    Raises PackageError for an unknown parameter set, plans or bounds it does not allow, and
    PrivacyBoundError when the claimed distance is over the package's own limit or over `privacy_bound_log2`.
    """
    contract = manifest.moai
    try:
        parameters = get_parameter_set(contract.parameter_set)
    except ConfigurationError as error:
        raise PackageError(f"the package cannot be evaluated here: {error}") from None
    for group in contract.groups:
        group_plans(group, parameters)
        largest_rank = scale_rank(contract.mode, max(projection.rank for projection in group.projections))
        if group.norm_bound != parameters.norm_bound(group.d_in, largest_rank):
            raise PackageError(f"layer {group.layer} {group.group}: norm_bound is not that of {parameters.name}")
        if group.error_bound > ERROR_BOUND:
            raise PackageError(f"layer {group.layer} {group.group}: error_bound is over {ERROR_BOUND}")
    check_privacy(contract.total_variation_log2, min(contract.privacy_bound_log2, privacy_bound_log2))
    return parameters


def group_plans(group: Group, parameters: ParameterSet) -> tuple[Plan, ...]:
    """The plans compiled into a group. Raises PackageError when one is outside the bounds of the protocol."""
    try:
        plans = tuple(Plan.parse(identifier) for identifier in group.plans)
        for plan in plans:
            plan.check(parameters)
            if plan.chunk_bytes(parameters, group.d_in, group.rows) > MAX_CHUNK_BYTES:
                raise InvalidInputError(f"one call of plan {plan.identifier} does not fit a frame")
    except InvalidInputError as error:
        raise PackageError(f"layer {group.layer} {group.group}: {error}") from None
    return plans


def check_weights(
    manifest: Manifest,
    parameters: ParameterSet,
    weights: tuple[GroupWeights, ...],
    privacy_bound_log2: int = DEFAULT_PRIVACY_BOUND_LOG2,
) -> None:
    """Check decrypted weights against what the manifest claims about them.

    Raises PackageError when a projection's norm is over its bound (products could wrap around) and
    PrivacyBoundError when the distance computed from the weights is over the claimed one or over a limit.
    """
    for group, member in zip(manifest.moai.groups, weights, strict=True):
        for projection in group.projections:
            rows = member.integers[projection.row_offset : projection.row_offset + projection.rank]
            norm = float(np.linalg.norm(rows.astype(np.float64)))
            if norm > parameters.norm_bound(group.d_in, projection.rank):
                raise PackageError(f"layer {group.layer} {projection.name}: weights exceed their norm bound")
    found = package_total_variation(
        parameters,
        ((member, group_plans(group, parameters)) for group, member in zip(manifest.moai.groups, weights, strict=True)),
        manifest.token_budget,
    )
    contract = manifest.moai
    check_privacy(found, min(contract.total_variation_log2, contract.privacy_bound_log2, privacy_bound_log2))


def check_privacy(found_log2: float, limit_log2: int) -> None:
    """Raise PrivacyBoundError when a statistical distance is over its limit."""
    if found_log2 > limit_log2 + _TOLERANCE:
        raise PrivacyBoundError(
            f"the responses' statistical distance is 2^{found_log2:.1f} over the token budget, above the "
            f"limit 2^{limit_log2}: lower the token budget or the weight bits"
        )
