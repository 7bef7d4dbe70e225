from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import ParameterSet, get_parameter_set, ntt
from tests.ckks import reference
from tests.ckks.conftest import RINGS

VECTORS = Path(__file__).parent / "vectors"


def forward(polynomials: np.ndarray, parameters: ParameterSet) -> np.ndarray:
    output = np.empty_like(polynomials)
    primes = np.array(parameters.primes, np.uint32)
    ntt.forward_all(polynomials.copy(), output, ntt.tables(parameters.primes, parameters.degree), primes)
    return output


def inverse(values: np.ndarray, parameters: ParameterSet) -> np.ndarray:
    output = np.empty_like(values)
    primes = np.array(parameters.primes, np.uint32)
    ntt.inverse_all(values.copy(), output, ntt.tables(parameters.primes, parameters.degree), primes)
    return output


def random_polynomials(parameters: ParameterSet, seed: int, count: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, p, (count, parameters.degree), np.uint32) for p in parameters.primes], axis=1)


def test_the_transform_is_the_evaluation_it_claims_to_be(each_ring: ParameterSet) -> None:
    parameters = each_ring
    polynomial = random_polynomials(parameters, 1)
    values = forward(polynomial, parameters)
    for index, prime in list(enumerate(parameters.primes))[:2]:
        expected = reference.transform_by_definition(polynomial[0, index], prime)
        np.testing.assert_array_equal(values[0, index], expected)
        np.testing.assert_array_equal(reference.transform(polynomial[0, index], prime), expected)


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(RINGS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.sampled_from(["random", "largest", "zero", "one"]),
)
def test_forward_and_inverse_agree_with_the_reference(name: str, seed: int, count: int, kind: str) -> None:
    parameters = get_parameter_set(name)
    polynomials = random_polynomials(parameters, seed, count)
    if kind == "largest":
        polynomials[:] = (np.array(parameters.primes, np.uint32) - 1)[:, None]
    elif kind != "random":
        polynomials[:] = 0
        polynomials[..., seed % parameters.degree] = kind == "one"
    values = forward(polynomials, parameters)
    for index, prime in enumerate(parameters.primes):
        np.testing.assert_array_equal(values[:, index], reference.transform(polynomials[:, index], prime))
        np.testing.assert_array_equal(reference.inverse(values[:, index], prime), polynomials[:, index])
    np.testing.assert_array_equal(inverse(values, parameters), polynomials)


def test_forward_takes_lazy_values_below_four_p(each_ring: ParameterSet) -> None:
    parameters = each_ring
    polynomials = random_polynomials(parameters, 2)
    lazy = polynomials + 3 * np.array(parameters.primes, np.uint32)[:, None]
    np.testing.assert_array_equal(forward(lazy, parameters), forward(polynomials, parameters))


@pytest.mark.parametrize("keep", range(7))
def test_the_pruned_inverse_gives_exactly_the_wanted_coefficients(each_ring: ParameterSet, keep: int) -> None:
    parameters = each_ring
    polynomials = random_polynomials(parameters, keep)
    values = forward(polynomials, parameters)
    factors = ntt.tables(parameters.primes, parameters.degree)
    indices = np.arange(parameters.degree)
    for skip in range(13 - keep):
        mask = (1 << skip) - 1
        for index, prime in enumerate(parameters.primes):
            source, target = values[0, index].copy(), np.empty(parameters.degree, np.uint32)
            ntt.inverse_pruned(source, target, keep, skip, factors[index], np.uint32(prime))
            kept = indices[(indices >> keep) & mask == mask]
            positions = [ntt.pruned_position.py_func(int(k), keep, skip) for k in kept]
            assert len(set(positions)) == len(kept)
            np.testing.assert_array_equal(target[positions] % prime, polynomials[0, index, kept])


def test_pointwise_products_are_negacyclic_products(each_ring: ParameterSet) -> None:
    parameters = each_ring
    a, b = random_polynomials(parameters, 3)[0], random_polynomials(parameters, 4)[0]
    primes = np.array(parameters.primes, np.uint64)[:, None]
    product = forward(a[None], parameters)[0].astype(np.uint64) * forward(b[None], parameters)[0] % primes
    coefficients = inverse(product.astype(np.uint32)[None], parameters)[0]
    q = parameters.modulus
    expected = reference.negacyclic(reference.combine(a, parameters.primes), reference.combine(b, parameters.primes), q)
    assert reference.combine(coefficients, parameters.primes) == expected


def test_known_transform(each_ring: ParameterSet) -> None:
    parameters = each_ring
    vector = json.loads((VECTORS / "ntt.json").read_text())
    polynomial = np.array(
        [[(n * n * 31 + 7 * n + 1) % p for n in range(parameters.degree)] for p in parameters.primes], np.uint32
    )
    values = forward(polynomial[None], parameters)[0]
    for index, row in enumerate(vector["degrees"][str(parameters.degree)]):
        assert row["prime"] == parameters.primes[index]
        assert row["psi"] == ntt.primitive_root(row["prime"], parameters.degree)
        assert values[index, row["positions"]].tolist() == row["values"]
