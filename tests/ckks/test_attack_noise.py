"""The host knows the error e of its own ciphertexts, and the phase error of a response holds W·e: it solves for W.

This works against an evaluator that only adds a fresh encryption of zero; the flood is there to stop it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tensorguard.ckks import ParameterSet, Plan
from tests.ckks import attacks, reference
from tests.ckks.attacks import Watch
from tests.ckks.conftest import Pair, make_weights

PLAN = Plan(1, 64, 4)
QUERIES = 160
"""Each gives 4 equations; a polynomial holds 256 weights."""


def correlation(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the weights with their least-squares estimate from the phase errors of encryptions of zeros."""
    weights = make_weights(PLAN.rows, PLAN.channels, pair.parameters)
    watch = Watch.start(monkeypatch)
    sent, _ = attacks.ask(pair, np.zeros((QUERIES, PLAN.channels)), weights, PLAN)
    phases = watch.phases(pair, PLAN, PLAN.rows).astype(np.float64)
    errors = attacks.own_errors(pair, sent)
    assert np.abs(errors).max() <= 21
    # Coefficient k of e·W is the sum over n of W[n]·e[k - n], where e[-n] is -e[N - n].
    known = np.arange(PLAN.channels * PLAN.rows)
    equations = []
    for row in range(PLAN.rows):
        at = reference.wanted(PLAN, 0, row) - known
        equations.append(np.where(at >= 0, 1, -1) * errors[:, at % errors.shape[1]])
    found = np.linalg.lstsq(np.concatenate(equations), phases.T.ravel(), rcond=None)[0]
    polynomial = weights.integers[:, ::-1].ravel()  # the channels of a row backwards (docs/protocol.md, "Encoding")
    return float(np.corrcoef(found, polynomial)[0, 1])


@pytest.mark.parametrize(
    ("weaken", "least"),
    [
        (attacks.without_flood, 0.999),
        # Of the size of the noise itself: "some flood" is not enough.
        (lambda monkeypatch: attacks.with_narrow_flood(monkeypatch, 18), 0.9),
        (lambda monkeypatch: attacks.with_narrow_flood(monkeypatch, 20), 0.4),
    ],
    ids=["none", "18 bits", "20 bits"],
)
def test_the_weights_are_found_where_the_flood_is_missing_or_narrow(
    parameters: ParameterSet,
    monkeypatch: pytest.MonkeyPatch,
    weaken: Callable[[pytest.MonkeyPatch], None],
    least: float,
) -> None:
    weaken(monkeypatch)
    assert correlation(Pair.create(parameters), monkeypatch) > least


def test_the_flood_leaves_no_correlation(each_ring: ParameterSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 independent values it is 0 ± 0.06."""
    assert abs(correlation(Pair.create(each_ring), monkeypatch)) < 0.3
