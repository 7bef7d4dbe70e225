"""A host that sends a malformed pk0, so that the wanted coefficients of pk0·u spell u out.

With u it could take pk1·u away from c1. Each wanted coefficient has log2 p0 = 30 bits; a plan has at most 128.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.ckks import PARAMETER_SETS, EncodedGroup, Evaluator, GroupWeights, ParameterSet, Plan, plan
from tensorguard.errors import InvalidInputError
from tests.ckks import reference
from tests.ckks.attacks import Watch
from tests.ckks.conftest import SESSION

STEP = 67
"""Residues between two sums of digits: the flood reaches 32 steps to both sides, roundings one more."""
DIGITS = 15
"""Base-3 digits that one coefficient can hold: 67·3^15 < p0 < 67·3^16."""


def read_mask(parameters: ParameterSet, chosen: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many values of u are read from one response, and how many of those are right."""
    p0 = parameters.primes[0]
    assert STEP * 3**DIGITS < p0 < STEP * 3 ** (DIGITS + 1)
    dropped = parameters.modulus // p0
    pk0 = np.stack(
        [
            reference.transform(
                np.array(
                    [STEP * 3**i * dropped % prime for i in range(DIGITS)] + [0] * (parameters.degree - DIGITS),
                    np.uint64,
                ),
                prime,
            )
            for prime in parameters.primes
        ]
    ).astype(np.uint32)
    rows, channels = chosen.rows, chosen.channels
    # Weights do not matter: b = 0 leaves nothing but pk0·u + f in c0.
    weights = GroupWeights(np.ones((rows, channels), np.int32), (0,) * rows, parameters.norm_bound(channels, rows))
    watch = Watch.start(monkeypatch)
    evaluator = Evaluator(parameters, pk0, os.urandom(32), SESSION)
    b = np.zeros((1, len(parameters.primes), parameters.degree), np.uint32)
    group = EncodedGroup(weights, parameters, [chosen])
    response = evaluator.evaluate(group, chosen, 1, np.array([1], np.uint64), os.urandom(32), b)
    u = watch.trits[0].astype(np.int64) - 1
    return compare(response.c0[0].astype(np.int64), u, p0, chosen)


def compare(c0: npt.NDArray[np.int64], u: npt.NDArray[np.int64], p0: int, chosen: Plan) -> tuple[int, int]:
    right = 0
    for row, value in enumerate(np.where(c0 > p0 // 2, c0 - p0, c0)):
        total, at = round(value / STEP), reference.wanted(chosen, 0, row)
        for i in range(DIGITS):
            digit = (total + 1) % 3 - 1
            total = (total - digit) // 3
            right += digit == u[at - i]
    return DIGITS * len(c0), right


def test_at_the_limit_less_than_half_of_the_mask_is_read(
    parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack works as far as 128 coefficients go: 1,920 of 4,096 values, and the rest stays as it was drawn."""
    read, right = read_mask(parameters, Plan(1, 32, 128), monkeypatch)
    assert read == right == 1920
    assert parameters.degree - read > parameters.degree / 2


def test_twice_the_limit_would_give_nearly_all_of_it(parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_OUTPUTS", 256)
    read, right = read_mask(parameters, Plan(1, 16, 256), monkeypatch)
    assert read == right == 3840


@pytest.mark.parametrize("identifier", ["t1.c16.r256", "t64.c16.r4", "t2.c8.r128", "t4.c16.r33"])
def test_plans_over_the_limit_are_refused(identifier: str) -> None:
    with pytest.raises(InvalidInputError, match="outputs per response"):
        Plan.parse(identifier)


@pytest.mark.parametrize("name", sorted(PARAMETER_SETS))
def test_what_a_response_returns_has_fewer_bits_than_the_mask(name: str) -> None:
    """Whatever pk0: 128 residues modulo p0 do not determine u."""
    parameters = PARAMETER_SETS[name]
    returned = plan.MAX_OUTPUTS * math.log2(parameters.primes[0])
    mask = parameters.degree * math.log2(3)
    assert returned < 0.6 * mask


def test_every_response_has_a_mask_of_its_own(parameters: ParameterSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a second response would tell what the first left open."""
    chosen = Plan(1, 32, 16)
    weights = GroupWeights(np.ones((48, 32), np.int32), (0,) * 48, parameters.norm_bound(32, 48))
    watch, shape = Watch.start(monkeypatch), (len(parameters.primes), parameters.degree)
    evaluator = Evaluator(parameters, np.zeros(shape, np.uint32), bytes(32), SESSION)
    b = np.zeros((2, *shape), np.uint32)
    group = EncodedGroup(weights, parameters, [chosen])
    masks = []
    for first in (1, 3):
        ids = np.array([first, first + 1], np.uint64)
        evaluator.evaluate(group, chosen, 2, ids, os.urandom(64), b)
        masks += [mask.tobytes() for mask in watch.trits]
    assert len(masks) == len(set(masks)) == 12
