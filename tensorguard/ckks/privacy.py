"""How far a response's distribution is from one that depends on W·x alone (docs/protocol.md, "Privacy")."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.weights import GroupWeights
from tensorguard.errors import InvalidInputError


def phase_error_variance(parameters: ParameterSet, weights: GroupWeights, plan: Plan) -> float:
    """δ²: variance of the noise under the flood, largest over the response polynomials of this plan."""
    squares = np.square(weights.integers.astype(np.float64)).sum(axis=1)
    largest = float(np.add.reduceat(squares, np.arange(0, weights.rows, plan.rows)).max())
    fresh = 2.0 * parameters.error_variance * (2.0 * parameters.degree / 3.0)
    return parameters.error_variance * largest + fresh


def total_variation(
    parameters: ParameterSet, weights: GroupWeights, plans: Plan | Iterable[Plan], coefficients: int
) -> float:
    """log2 of the statistical distance over this many returned coefficients, worst of ``plans``.

    KL per coefficient <= 1.04 δ² / (2 σ_f²); Pinsker over n of them: sqrt(n KL / 2).
    """
    if coefficients < 1:
        raise InvalidInputError("coefficients must be at least 1")
    chosen = (plans,) if isinstance(plans, Plan) else tuple(plans)
    if not chosen:
        raise InvalidInputError("need at least one plan")
    variance = max(phase_error_variance(parameters, weights, plan) for plan in chosen)
    divergence = 1.04 * variance / (2.0 * parameters.flood_variance)
    return 0.5 * (math.log2(coefficients) + math.log2(divergence) - 1.0)
