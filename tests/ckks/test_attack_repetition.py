"""The same input again and again: averaging makes W·x exact, and tells nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tensorguard.ckks import ParameterSet, Plan
from tests.ckks.conftest import Pair, make_weights

ROWS, CHANNELS, REPEATS = 64, 64, 256


def test_averaging_reduces_the_noise_of_the_product_and_finds_no_other_part(parameters: ParameterSet) -> None:
    pair = Pair.create(parameters)
    weights = make_weights(ROWS, CHANNELS, parameters)
    exact = weights.integers * weights.row_scales[:, None]
    x = np.random.default_rng(7).normal(size=CHANNELS)
    x /= np.linalg.norm(x)
    inputs = np.tile(x, (REPEATS, 1))
    z = pair.product(inputs, weights, Plan(1, CHANNELS, ROWS))
    noise = parameters.noise(weights.norm_bound) * weights.row_scales[0]
    # One response is as noisy as the protocol says, and the mean of k is by the square root of k better: no more.
    assert np.std(z - exact @ x) == pytest.approx(noise, rel=0.05)
    assert np.std(z.mean(axis=0) - exact @ x) == pytest.approx(noise / REPEATS**0.5, rel=0.35)
    # Least squares over all of it: the projection of W on x, and of the rest nothing at all.
    found = np.linalg.lstsq(inputs, z, rcond=None)[0].T
    np.testing.assert_allclose(found @ x, exact @ x, atol=6 * noise / REPEATS**0.5)
    along = np.outer(exact @ x, x)
    np.testing.assert_allclose(found, np.outer(found @ x, x), atol=1e-9 * np.abs(exact).max())
    rest = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert rest == pytest.approx(np.linalg.norm(exact - along) / np.linalg.norm(exact), rel=1e-3)
    assert rest > 0.98


def test_residuals_of_repeated_queries_are_noise(parameters: ParameterSet) -> None:
    """After the mean is taken off, no row's residuals tell those of another: their covariance is that of noise."""
    pair = Pair.create(parameters)
    weights = make_weights(ROWS, CHANNELS, parameters)
    z = pair.product(np.ones((REPEATS, CHANNELS)), weights, Plan(1, CHANNELS, ROWS))
    residuals = z - z.mean(axis=0)
    correlations = np.corrcoef(residuals.T)[np.triu_indices(ROWS, 1)]
    # 2,016 pairs of 256 samples: each is 0 ± 0.063.
    assert np.abs(correlations).max() < 6 * REPEATS**-0.5
    assert np.std(correlations) == pytest.approx(REPEATS**-0.5, rel=0.1)


@pytest.mark.parametrize("channel", [0, 31, 63])
def test_a_one_hot_input_shows_its_column_and_a_zero_input_nothing(parameters: ParameterSet, channel: int) -> None:
    pair = Pair.create(parameters)
    weights = make_weights(ROWS, CHANNELS, parameters)
    x = np.zeros((2, CHANNELS))
    x[0, channel] = -3.0
    z = pair.product(x, weights, Plan(1, CHANNELS, ROWS))
    noise = parameters.noise(weights.norm_bound) * weights.row_scales
    assert (np.abs(z[0] + 3.0 * weights.integers[:, channel] * weights.row_scales) < 3.0 * 6 * noise).all()
    assert (np.abs(z[1]) < 6 * noise).all()
    assert np.std(z[1]) == pytest.approx(noise[0], rel=0.4)
