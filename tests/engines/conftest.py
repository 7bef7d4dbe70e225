"""Both engines, on the same inputs. One that cannot run here is skipped, and the reason says what it needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tensorguard.ckks import (
    PARAMETER_SETS,
    EncryptedActivations,
    EvaluatedRows,
    GroupWeights,
    HostSession,
    ParameterSet,
    Plan,
    get_parameter_set,
)
from tensorguard.engines import BACKENDS, Engine, RequestEvaluator, load_engine
from tensorguard.errors import ConfigurationError

SESSION = b"session under test"


def engine_or_skip(name: str) -> Engine[Any]:
    try:
        return load_engine(name)
    except ConfigurationError as error:
        if name == "cpu":
            raise
        pytest.skip(f"{error.message.partition(':')[0]} (make test-coprocessor-310 has a Python for it)")


@pytest.fixture(scope="session", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Engine[Any]:
    return engine_or_skip(request.param)


def one_of_each_ring() -> list[str]:
    """Names of parameter sets that have the ring and the flood of no earlier one."""
    rings = {(p.degree, p.primes, p.flood_bits): name for name, p in reversed(list(PARAMETER_SETS.items()))}
    return sorted(rings.values())


@pytest.fixture(scope="session", params=one_of_each_ring())
def parameters(request: pytest.FixtureRequest) -> ParameterSet:
    return get_parameter_set(request.param)


@dataclass
class Pair:
    """Both sides of one session."""

    engine: Engine[Any]
    parameters: ParameterSet
    host: HostSession
    seed: bytes
    evaluator: RequestEvaluator[Any]

    @classmethod
    def create(cls, engine: Engine[Any], parameters: ParameterSet) -> Pair:
        seed = os.urandom(32)
        host = HostSession.create(parameters, seed, SESSION)
        return cls(engine, parameters, host, seed, engine.evaluator(parameters, host.public_key, seed, SESSION))

    def evaluate(self, weights: GroupWeights, sent: EncryptedActivations) -> EvaluatedRows:
        group = self.engine.encode(weights, self.parameters, [sent.plan])
        return self.evaluator.evaluate(group, sent.plan, sent.tokens, sent.ids, sent.seeds, sent.b)

    def product(self, x: np.ndarray, weights: GroupWeights, plan: Plan) -> np.ndarray:
        sent = self.host.encrypt(x, plan, weights.norm_bound)
        return self.host.decrypt(sent, self.evaluate(weights, sent), weights.rows, weights.row_scales)


@pytest.fixture(scope="session")
def pair(engine: Engine[Any], parameters: ParameterSet) -> Pair:
    return Pair.create(engine, parameters)


@pytest.fixture(scope="session")
def openfhe(parameters: ParameterSet) -> Pair:
    return Pair.create(engine_or_skip("openfhe"), parameters)
