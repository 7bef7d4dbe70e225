"""Factoring: U @ A' is the module, U tells no more than the column space, and degenerate modules work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.lora.adapter import LoraModule
from tensorguard.lora.factorisation import factor
from tests.lora.test_randomness import deterministic


def module(d_in: int, d_out: int, rank: int, seed: int = 0, scaling: float = 2.0) -> LoraModule:
    generator = np.random.default_rng(seed)
    return LoraModule(
        A=generator.normal(0, 0.1, (rank, d_in)).astype(np.float32),
        B=generator.normal(0, 0.1, (d_out, rank)).astype(np.float32),
        scaling=scaling,
    )


def product(lora: LoraModule) -> np.ndarray:
    return lora.scaling * lora.B.astype(np.float64) @ lora.A.astype(np.float64)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 1000))
def test_reproduces_the_module(d_in: int, d_out: int, rank: int, seed: int) -> None:
    lora = module(d_in, d_out, rank, seed)
    factored = factor(lora)
    expected = product(lora)
    error = np.linalg.norm(factored.u.astype(np.float64) @ factored.weights - expected)
    assert error <= 2e-7 * np.linalg.norm(expected)
    assert factored.u.dtype == np.float32
    assert factored.u.shape == (d_out, min(rank, d_out))
    assert factored.weights.shape == (min(rank, d_out), d_in)
    assert factored.effective_rank == min(rank, d_out, d_in)


def test_columns_are_orthonormal_to_float32() -> None:
    u = factor(module(50, 60, 8)).u.astype(np.float64)
    assert np.abs(u.T @ u - np.eye(8)).max() < 1e-6


def test_least_squares_is_at_least_as_exact_as_the_transpose() -> None:
    lora = module(200, 100, 32)
    factored = factor(lora)
    u = factored.u.astype(np.float64)
    by_transpose = u.T @ product(lora)
    assert np.linalg.norm(u @ factored.weights - product(lora)) <= np.linalg.norm(u @ by_transpose - product(lora))


@pytest.mark.parametrize("rank_left", [0, 1, 3])
def test_low_rank_modules_are_padded_with_directions_of_their_own(rank_left: int) -> None:
    lora = module(40, 50, 6)
    lora.B[:, rank_left:] = 0
    factored = factor(lora)
    assert factored.effective_rank == rank_left
    assert factored.u.shape == (50, 6)
    u = factored.u.astype(np.float64)
    assert np.abs(u.T @ u - np.eye(6)).max() < 1e-6
    assert np.linalg.norm(u @ factored.weights - product(lora)) <= 2e-7 * max(np.linalg.norm(product(lora)), 1)
    assert np.isfinite(factored.weights).all()


def test_padding_does_not_show_the_range_of_b() -> None:
    # A of rank 1, B of rank 6: five directions of B never reach the output, and U must not contain them.
    lora = module(40, 500, 6)
    lora.A[1:] = lora.A[0]
    u = factor(lora).u.astype(np.float64)
    b = np.linalg.qr(lora.B.astype(np.float64))[0]
    overlap = np.linalg.svd(b.T @ u, compute_uv=False)
    assert overlap[0] > 0.999  # the one direction that does
    assert overlap[1] < 0.5


def test_directions_below_the_cutoff_are_dropped() -> None:
    lora = module(40, 50, 2)
    lora.B[:, 1] *= 1e-12
    assert factor(lora).effective_rank == 1


def test_u_does_not_depend_on_how_the_module_was_factored() -> None:
    # The same B @ A from another A and B gives, with the same random bytes, the same column space and
    # weights' norm.
    lora = module(30, 20, 4)
    mix = np.random.default_rng(9).normal(size=(4, 4))
    other = LoraModule(
        A=(np.linalg.inv(mix) @ lora.A).astype(np.float32),
        B=(lora.B @ mix).astype(np.float32),
        scaling=lora.scaling,
    )
    first, second = factor(lora, deterministic(1)), factor(other, deterministic(1))
    projector = [f.u.astype(np.float64) @ f.u.astype(np.float64).T for f in (first, second)]
    assert np.abs(projector[0] - projector[1]).max() < 1e-4
    # Row norms of A' are those of a random rotation, so they do not show the singular values one by one.
    assert np.linalg.norm(first.weights) == pytest.approx(np.linalg.norm(second.weights), rel=1e-4)


def test_two_runs_give_different_bases() -> None:
    lora = module(30, 20, 4)
    assert not np.allclose(factor(lora).u, factor(lora).u)


def test_u_is_not_the_singular_basis() -> None:
    # Columns of U0 would be singular vectors of B @ A: U0^T W W^T U0 is diagonal. After the rotation it is
    # not.
    lora = module(60, 50, 5)
    lora.B[:, 0] *= 100
    gram = (u := factor(lora, deterministic(3)).u.astype(np.float64)).T @ product(lora) @ product(lora).T @ u
    off_diagonal = gram - np.diag(np.diag(gram))
    assert np.linalg.norm(off_diagonal) > 0.1 * np.linalg.norm(gram)
