"""Random orthogonal matrices: distribution, orthogonality, and where the randomness comes from."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.lora.randomness import haar_orthogonal, random_complement, standard_normal


def deterministic(seed: int) -> object:
    """Bytes of SHAKE-256, so that statistical tests do not fail by chance."""
    return lambda count: hashlib.shake_256(seed.to_bytes(8, "big")).digest(count)


def test_normal_moments() -> None:
    x = standard_normal(1000, 201, deterministic(1)).ravel()
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**4).mean() - 3) < 0.1
    assert abs((np.abs(x) < 0.6745).mean() - 0.5) < 0.005  # quartiles


def test_box_muller_known_values() -> None:
    # radius uniform = 2^-53 * 1 (all-zero words) and angle 0 give the largest value there is.
    x = standard_normal(1, 2, lambda count: bytes(count))
    assert x[0, 0] == pytest.approx(np.sqrt(2 * 53 * np.log(2)))
    assert x[0, 1] == 0.0


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_haar_is_orthogonal(size: int, seed: int) -> None:
    q = haar_orthogonal(size, deterministic(seed))
    assert np.abs(q.T @ q - np.eye(size)).max() < 1e-12


def test_haar_is_uniform() -> None:
    # Of a Haar matrix each entry has mean 0 and variance 1/n, the trace has variance 1 (Diaconis and
    # Shahshahani). Without the signs of R's diagonal the diagonal entries are biased; the next test shows
    # that this one notices.
    traces = [np.trace(haar_orthogonal(4, deterministic(seed))) for seed in range(2000)]
    assert abs(np.mean(traces)) < 0.08
    assert abs(np.var(traces) - 1) < 0.12


def test_qr_without_signs_is_not_uniform() -> None:
    traces = [np.trace(np.linalg.qr(standard_normal(4, 4, deterministic(seed)))[0]) for seed in range(500)]
    assert abs(np.mean(traces)) > 0.5


def test_size_one_has_both_signs() -> None:
    assert {float(haar_orthogonal(1, deterministic(seed))[0, 0]) for seed in range(20)} == {1.0, -1.0}


def test_complement_is_orthonormal_and_orthogonal() -> None:
    basis = haar_orthogonal(30, deterministic(1))[:, :11]
    complement = random_complement(basis, 9, deterministic(2))
    assert np.abs(complement.T @ complement - np.eye(9)).max() < 1e-12
    assert np.abs(basis.T @ complement).max() < 1e-12


def test_default_source_is_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert standard_normal.__defaults__ == (os.urandom,)
    assert haar_orthogonal.__defaults__ == (os.urandom,)
    assert random_complement.__defaults__ == (os.urandom,)
    np.random.seed(1)
    first = haar_orthogonal(3)
    np.random.seed(1)
    assert not np.array_equal(first, haar_orthogonal(3))
