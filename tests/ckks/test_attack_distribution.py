"""Two adapters with equal W·x give the same responses: function privacy, by experiment.

8,192 returned coefficients and 262,144 coefficients of c1 from each; a statistic is the distance of the two samples
in standard deviations, and 5 of them are reached by chance once in three million times. Each has a control that shows
what it would see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.ckks import GroupWeights, ParameterSet, Plan
from tests.ckks import attacks, stepwise
from tests.ckks.attacks import Watch
from tests.ckks.conftest import Pair, make_weights

PLAN = Plan(64, 32, 2)
TOKENS = 64 * 64
CHANCE, SEEN = 5.0, 20.0
CELLS = 16
Integers = npt.NDArray[np.int32]


@dataclass
class Sample:
    """What responses to one input look like, each sorted into 16 cells."""

    value: npt.NDArray[np.int64]
    """Decrypted residues modulo p0."""
    c1_low: npt.NDArray[np.int64]
    c1_high: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int64]
    """Bits 14 to 17 of the phase before the modulus switch: those that the noise under the flood fills."""

    def distances(self, other: Sample) -> dict[str, float]:
        names = ("value", "c1_low", "c1_high", "phase")
        return {name: attacks.chi_square(getattr(self, name), getattr(other, name), CELLS) for name in names}


def sample(pair: Pair, integers: Integers, x: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch) -> Sample:
    weights = GroupWeights(integers, (0,) * len(integers), pair.parameters.norm_bound(PLAN.channels, PLAN.rows))
    with monkeypatch.context() as patched:
        watch = Watch.start(patched)
        sent, response = attacks.ask(pair, np.tile(x, (TOKENS, 1)), weights, PLAN)
        phases = watch.phases(pair, PLAN, PLAN.rows)
    # A cell is 8 residue steps, of which the noise (a deviation of 17.7) fills several.
    z = pair.host.decrypt(sent, response, PLAN.rows, weights.row_scales)
    values = np.rint(z / (sent.unit * sent.norms[:, None])).astype(np.int64)
    return Sample(
        value=values // 8 % CELLS,
        c1_low=response.c1.astype(np.int64) % CELLS,
        c1_high=response.c1.astype(np.int64) * CELLS // pair.parameters.primes[0],
        phase=(phases >> 14).astype(object) % CELLS,
    )


def pairs_of_weights(parameters: ParameterSet) -> dict[str, tuple[Integers, Integers, npt.NDArray[np.float64]]]:
    """Two weights and an input on which they agree, as integers."""
    strong = make_weights(PLAN.rows, PLAN.channels, parameters, rank=PLAN.rows).integers // 2
    nothing = np.zeros_like(strong)
    one_hot = np.zeros(PLAN.channels)
    one_hot[5] = 1.0
    column = nothing.copy()
    column[:, 5] = strong[:, 5]
    # Equal sums: 2^30 / sqrt(32) is no integer, but all 32 mantissas are equal.
    flat = nothing.copy()
    flat[:, 0] = strong.sum(axis=1)
    return {
        "zero input": (nothing, strong, np.zeros(PLAN.channels)),
        "one-hot input": (column, strong, one_hot),
        "flat input": (flat, strong, np.ones(PLAN.channels)),
    }


@pytest.mark.parametrize("name", ["zero input", "one-hot input", "flat input"])
def test_responses_depend_on_the_product_only(
    parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first, second, x = pairs_of_weights(parameters)[name]
    pair = Pair.create(parameters)
    distances = sample(pair, first, x, monkeypatch).distances(sample(pair, second, x, monkeypatch))
    assert max(distances.values()) < CHANCE, distances


def test_control_without_the_flood_the_phase_tells_them_apart(
    parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, x = pairs_of_weights(parameters)["one-hot input"]
    attacks.without_flood(monkeypatch)
    pair = Pair.create(parameters)
    assert sample(pair, first, x, monkeypatch).distances(sample(pair, second, x, monkeypatch))["phase"] > SEEN


def test_control_without_the_encryption_of_zero_c1_tells_them_apart(
    parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of zero against others: then c1 is nothing but a rounded error."""
    first, second, x = pairs_of_weights(parameters)["zero input"]
    stepwise.without_encryption_of_zero(monkeypatch)
    pair = Pair.create(parameters)
    distances = sample(pair, first, x, monkeypatch).distances(sample(pair, second, x, monkeypatch))
    assert distances["c1_low"] > SEEN and distances["c1_high"] > SEEN


def test_control_products_that_differ_by_the_noise_are_told_apart(
    parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 18 residue steps of 2^30, one deviation of the noise: equal products are needed for equal distributions."""
    first, _, x = pairs_of_weights(parameters)["one-hot input"]
    residues_per_unit = 0.45 * parameters.primes[0] / parameters.norm_bound(PLAN.channels, PLAN.rows)
    x[6] = 9.0 / residues_per_unit
    other = first.copy()
    other[:, 6] += 2
    pair = Pair.create(parameters)
    assert sample(pair, first, x, monkeypatch).distances(sample(pair, other, x, monkeypatch))["value"] > SEEN
