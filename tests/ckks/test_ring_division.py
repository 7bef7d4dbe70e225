"""The attack that re-randomisation exists for: whoever knows `a` divides c1 = a·W by it and has the weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.ckks import EncodedGroup, Plan, kernels
from tests.ckks import stepwise
from tests.ckks.conftest import Pair, make_weights

# One block: the response's c1 is a single product, the easiest case for the attacker.
PLAN = Plan(1, 64, 16)


def divide(pair: Pair, group: EncodedGroup, monkeypatch: pytest.MonkeyPatch) -> npt.NDArray[np.bool_]:
    """Where c1 / a, computed pointwise modulo p0, equals the transformed weights."""
    captured: dict[str, npt.NDArray[np.uint32]] = {}
    expand = pair.evaluator._expander.expand
    multiply, recover = kernels.multiply, kernels.recover

    def watch_multiply(weights: object, b: object, a: npt.NDArray[np.uint32], i: int, *rest: object) -> None:
        multiply(weights, b, a, i, *rest)
        if i == 0:
            captured["a"], captured["products"] = a.copy(), rest[0].copy()  # type: ignore[attr-defined]

    def watch_recover(
        sums: npt.NDArray[np.uint32], errors: object, flood: object, response: int, i: int, *rest: object
    ) -> None:
        if (response, i) == (0, 0):
            captured["c1"] = sums[1].copy()
        recover(sums, errors, flood, response, i, *rest)

    stepwise.install(monkeypatch)
    monkeypatch.setattr(kernels, "multiply", watch_multiply)
    monkeypatch.setattr(kernels, "recover", watch_recover)
    sent = pair.host.encrypt(np.ones((1, group.d_in)), PLAN, pair.parameters.norm_bound(group.d_in, 16))
    pair.evaluator.evaluate(group, PLAN, 1, sent.ids, sent.seeds, sent.b)
    prime = int(pair.parameters.primes[0])
    # The host expands the same a from the seed it sent; nothing of the coprocessor's is needed for the division.
    a = expand(sent.ids.tolist(), sent.seeds)[0, 0].astype(object)
    honest = captured["products"][0, 1].astype(object)
    inverses = np.array([pow(int(value), -1, prime) for value in a], dtype=object)
    weights = honest * inverses % prime
    assert np.array_equal(weights * a % prime, honest % prime)
    return np.asarray(captured["c1"].astype(object) * inverses % prime == weights)


@pytest.fixture
def group(pair: Pair) -> EncodedGroup:
    return EncodedGroup(make_weights(16, 64, pair.parameters), pair.parameters, [PLAN])


def test_division_recovers_the_weights_where_nothing_is_added(
    pair: Pair, group: EncodedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack is real: with the encryption of zero taken out, every transformed weight is found."""
    stepwise.without_encryption_of_zero(monkeypatch)
    assert divide(pair, group, monkeypatch).all()


def test_division_recovers_nothing_from_the_product(
    pair: Pair, group: EncodedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert divide(pair, group, monkeypatch).sum() <= 1
