from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest

from tensorguard.ckks import (
    DEFAULT_PARAMETER_SET,
    PARAMETER_SETS,
    ParameterSet,
    compile_plans,
    get_parameter_set,
    total_variation,
)
from tensorguard.errors import ConfigurationError
from tests.ckks.conftest import make_weights


def test_every_set_is_under_both_security_bounds() -> None:
    assert DEFAULT_PARAMETER_SET in PARAMETER_SETS
    for name, parameters in PARAMETER_SETS.items():
        assert parameters.name == name
        bounds = {4096: (109, 101), 8192: (218, 202)}[parameters.degree]
        assert (parameters.security_bound_classical, parameters.security_bound_quantum) == bounds
        assert 89.9 < parameters.modulus_bits <= min(bounds)
        assert (parameters.secret_distribution, parameters.error_distribution) == (
            "uniform ternary",
            "centred binomial",
        )
        assert parameters.depth == 1
        assert 24 < parameters.precision_bits < 25


def test_a_large_model_loses_nothing_measurable_at_degree_8192() -> None:
    """Llama shapes at their norm bound: statistical distance under 2^-60 over 2^32 coefficients at every weight width,
    and six deviations of what encryption adds under 2^-14 for weights of two thirds of the bound.
    """
    for bits in range(12, 17):
        parameters = get_parameter_set(f"n8192-q150-w{bits}")
        for rows, d_in in ((48, 4096), (16, 14336)):
            bound = parameters.norm_bound(d_in, 16)
            weights = make_weights(rows, d_in, parameters)
            assert total_variation(parameters, weights, compile_plans(parameters, d_in, rows), 2**32) < -60
            assert 6 * parameters.noise(bound) / (0.66 * bound / math.sqrt(d_in)) < 2**-14


def test_four_primes_would_not_do() -> None:
    """The flood that hides enough leaves too few bits: why the ring of degree 8192 has five primes."""
    five = get_parameter_set("n8192-q150-w12")
    weights = make_weights(48, 4096, five)
    bound = five.norm_bound(14336, 16)
    for flood_bits in range(64, 108):
        four = dataclasses.replace(five, primes=five.primes[:4], flood_bits=flood_bits)
        hidden = total_variation(four, weights, compile_plans(four, 4096, 48), 2**32) < -60
        exact = 6 * four.noise(bound) / (0.66 * bound / math.sqrt(14336)) < 2**-14
        assert not (hidden and exact)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="n4096-q90-w12"):
        get_parameter_set("n4096-q120-w12")


@pytest.mark.parametrize(
    "change",
    [
        {"primes": (1073692673, 1073668097, 1073651713, 1073643521)},  # 120 bits: above the bound
        {"primes": (1073692673, 1073668097)},
        {"primes": (1073692673, 1073692673, 1073651713)},
        {"primes": (1073692673, 1073668097, 1073651715)},
        {"degree": 2048},
        {"degree": 8192},
        {"security_bound_classical": 200, "security_bound_quantum": 200},
        {"error_variance": 1.0},
        {"flood_bits": 32},
        {"flood_bits": 80},  # more than the inner products leave of q
        {"secret_distribution": "sparse ternary"},
        {"error_distribution": "uniform"},
        {"weight_bits": 30},
    ],
)
def test_unsafe_sets_cannot_be_made(parameters: ParameterSet, change: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        dataclasses.replace(parameters, **change)


def test_the_larger_ring_has_a_bound_of_its_own() -> None:
    parameters = get_parameter_set("n8192-q150-w12")
    with pytest.raises(ConfigurationError, match="exceeds 101"):
        dataclasses.replace(parameters, degree=4096, security_bound_classical=109, security_bound_quantum=101)
    for change in (
        {"primes": (*parameters.primes, 1073233921)},
        {"primes": (*parameters.primes[:4], 1073651713)},
        {"flood_bits": 121},
        {"security_bound_quantum": 218},
    ):
        with pytest.raises(ConfigurationError):
            dataclasses.replace(parameters, **change)


@pytest.mark.parametrize("d_in", [1, 576, 4096, 14336])
@pytest.mark.parametrize("bits", [12, 16])
def test_the_scale_is_the_exact_floor_and_cannot_wrap(d_in: int, bits: int) -> None:
    parameters = get_parameter_set(f"n4096-q90-w{bits}")
    bound = parameters.norm_bound(d_in, 128)
    scale = parameters.scale(bound)
    limit = Fraction(9, 10) * (parameters.modulus // 2)
    assert scale * Fraction(bound) * 2**30 <= limit < (scale + 1) * Fraction(bound) * 2**30


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 2.0**60])
def test_impossible_norm_bounds_are_refused(parameters: ParameterSet, bound: float) -> None:
    with pytest.raises(ConfigurationError):
        parameters.scale(bound)
