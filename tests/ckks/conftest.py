from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, HostSession, ParameterSet, Plan, get_parameter_set

SESSION = b"session under test"
SEED = bytes(range(32))
RINGS = ("n4096-q90-w12", "n8192-q150-w12")
"""One set of each ring: tests of arithmetic run over both."""


@pytest.fixture(scope="session")
def parameters() -> ParameterSet:
    return get_parameter_set("n4096-q90-w12")


@pytest.fixture(params=RINGS)
def each_ring(request: pytest.FixtureRequest) -> ParameterSet:
    return get_parameter_set(request.param)


def make_weights(rows: int, d_in: int, parameters: ParameterSet, seed: int = 0, rank: int = 16) -> GroupWeights:
    """Random weights just inside the norm bound."""
    bound = parameters.norm_bound(d_in, rank)
    real = np.random.default_rng(seed).normal(size=(rows, d_in))
    fraction = np.sqrt(min(rows, rank) / rows)
    integers = np.trunc(real * (0.99 * bound / np.linalg.norm(real) / fraction)).astype(np.int32)
    return GroupWeights(integers, (10,) * rows, bound)


@dataclass
class Pair:
    """Both sides of one session."""

    parameters: ParameterSet
    host: HostSession
    evaluator: Evaluator
    seed: bytes

    @classmethod
    def create(cls, parameters: ParameterSet, evaluator_type: type[Evaluator] = Evaluator, pool_bytes: int = 0) -> Pair:
        seed = os.urandom(32)
        host = HostSession.create(parameters, seed, SESSION, pool_bytes=pool_bytes)
        evaluator = evaluator_type(parameters, host.public_key, seed, SESSION, pool_bytes=pool_bytes)
        return cls(parameters, host, evaluator, seed)

    def product(self, x: np.ndarray, weights: GroupWeights, plan: Plan) -> np.ndarray:
        group = EncodedGroup(weights, self.parameters, [plan])
        sent = self.host.encrypt(x, plan, weights.norm_bound)
        response = self.evaluator.evaluate(group, plan, sent.tokens, sent.ids, sent.seeds, sent.b)
        return self.host.decrypt(sent, response, weights.rows, weights.row_scales)


@pytest.fixture(scope="session")
def pair(parameters: ParameterSet) -> Pair:
    return Pair.create(parameters)
