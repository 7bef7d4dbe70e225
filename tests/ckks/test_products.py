"""The multiply-accumulate against Python integers, where it is tightest: the largest residues, every batch length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import get_parameter_set, kernels
from tensorguard.ckks.arrays import aligned_empty
from tensorguard.ckks.products import GATHERED, MAX_PRODUCTS, SEGMENT
from tensorguard.ckks.ring import ring

PARAMETERS = get_parameter_set("n4096-q90-w12")
DEGREE = 4096


def product_sums(weights: np.ndarray, b: np.ndarray, a: np.ndarray, i: int, groups: int) -> np.ndarray:
    """Through the kernel, for one chunk: weights [groups, blocks, N], b and a [blocks, N] modulo prime ``i``."""
    constants = ring(PARAMETERS).constants
    blocks = len(b)
    primes = len(constants)
    laid_out = aligned_empty(primes, DEGREE // SEGMENT, groups, blocks, SEGMENT)
    laid_out[i] = weights.reshape(groups, blocks, -1, SEGMENT).transpose(2, 0, 1, 3)
    all_b = aligned_empty(blocks, primes, DEGREE)
    all_b[:, i] = b
    sums = aligned_empty(groups, 2, DEGREE)
    kernels.multiply(laid_out, all_b, a[:, None], i, sums, aligned_empty(blocks, GATHERED), constants, 0, groups)
    return sums


@pytest.mark.parametrize("blocks", [1, MAX_PRODUCTS - 1, MAX_PRODUCTS, MAX_PRODUCTS + 1, 2 * MAX_PRODUCTS, 37])
@pytest.mark.parametrize("i", range(3))
def test_the_largest_residues_do_not_overflow(blocks: int, i: int) -> None:
    p = PARAMETERS.primes[i]
    largest = np.full((blocks, DEGREE), p - 1, np.uint32)
    sums = product_sums(largest[None], largest, largest, i, 1)
    expected = blocks * (p - 1) ** 2 * pow(2**32, -1, p) % p
    assert (sums < 2 * p).all()
    assert (sums % p == expected).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_sums_equal_python_integers(blocks: int, groups: int, i: int, seed: int) -> None:
    p = PARAMETERS.primes[i]
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, p, (groups, blocks, DEGREE), dtype=np.uint32)
    # Mostly near the ends of the range.
    b, a = (
        np.where(generator.random((blocks, DEGREE)) < 0.5, values % 3, p - 1 - values % 3).astype(np.uint32)
        for values in generator.integers(0, p, (2, blocks, DEGREE))
    )
    sums = product_sums(weights, b, a, i, groups)
    inverse = pow(2**32, -1, p)
    for half, values in enumerate((b, a)):
        exact = (weights.astype(object) * values.astype(object)[None]).sum(axis=1) * inverse % p
        assert np.array_equal(sums[:, half].astype(object) % p, exact)
    assert (sums < 2 * p).all()
