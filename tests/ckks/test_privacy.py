from __future__ import annotations

import numpy as np
import pytest

from tensorguard.ckks import GroupWeights, Plan, compile_plans, get_parameter_set, total_variation
from tensorguard.ckks.privacy import phase_error_variance
from tensorguard.errors import InvalidInputError
from tests.ckks.conftest import make_weights

PARAMETERS = get_parameter_set("n4096-q90-w12")


def test_the_protocols_numbers() -> None:
    """Llama-size group, weights at their bound: about 2**-33 for 2**20 coefficients, 2**-27 for 2**32."""
    weights = make_weights(48, 4096, PARAMETERS)
    plans = compile_plans(PARAMETERS, 4096, 48)
    assert -35.0 < total_variation(PARAMETERS, weights, plans, 2**20) < -32.0
    assert -29.0 < total_variation(PARAMETERS, weights, plans, 2**32) < -26.0


def test_the_variance_is_that_of_the_worst_polynomial() -> None:
    integers = np.zeros((4, 10), np.int32)
    integers[0, 0], integers[1, 0], integers[2, 0], integers[3, 0] = 3, 4, 5, 6
    weights = GroupWeights(integers, (0,) * 4, 100.0)
    fresh = 2 * 10.5 * 2 * 4096 / 3
    assert phase_error_variance(PARAMETERS, weights, Plan(1, 10, 2)) == pytest.approx(10.5 * 61 + fresh)
    assert phase_error_variance(PARAMETERS, weights, Plan(1, 10, 3)) == pytest.approx(10.5 * 50 + fresh)
    assert phase_error_variance(PARAMETERS, weights, Plan(1, 10, 4)) == pytest.approx(10.5 * 86 + fresh)


def test_it_is_pinsker_on_the_kullback_leibler_bound() -> None:
    weights = make_weights(16, 576, PARAMETERS)
    plan = Plan(8, 64, 8)
    divergence = 1.04 * phase_error_variance(PARAMETERS, weights, plan) / (2 * 2.0**128 / 3)
    assert 2 ** total_variation(PARAMETERS, weights, plan, 1000) == pytest.approx(np.sqrt(1000 * divergence / 2))


def test_more_weight_bits_cost_privacy() -> None:
    values = []
    for bits in (12, 14, 16):
        parameters = get_parameter_set(f"n4096-q90-w{bits}")
        values.append(total_variation(parameters, make_weights(16, 576, parameters), Plan(1, 256, 16), 2**20))
    assert values == sorted(values)
    assert 3.5 < values[2] - values[0] < 4.5


def test_nonsense_is_refused() -> None:
    weights = make_weights(16, 576, PARAMETERS)
    with pytest.raises(InvalidInputError):
        total_variation(PARAMETERS, weights, Plan(1, 256, 16), 0)
    with pytest.raises(InvalidInputError):
        total_variation(PARAMETERS, weights, [], 1)
