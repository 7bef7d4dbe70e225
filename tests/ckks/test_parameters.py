from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest

from tensorguard.ckks import DEFAULT_PARAMETER_SET, PARAMETER_SETS, ParameterSet, get_parameter_set
from tensorguard.errors import ConfigurationError


def test_every_set_is_under_both_security_bounds() -> None:
    assert DEFAULT_PARAMETER_SET in PARAMETER_SETS
    for name, parameters in PARAMETER_SETS.items():
        assert parameters.name == name
        assert 89.9 < parameters.modulus_bits <= 101 == parameters.security_bound_quantum


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
        {"weight_bits": 30},
    ],
)
def test_unsafe_sets_cannot_be_made(parameters: ParameterSet, change: dict[str, object]) -> None:
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
