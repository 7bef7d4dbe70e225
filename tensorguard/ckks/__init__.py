"""CKKS with coefficient encoding for LoRA products, without rotations. Protocol: docs/protocol.md."""

from __future__ import annotations

import os

import numpy as np

from tensorguard.ckks.evaluator import Evaluator, OperationCounters
from tensorguard.ckks.host import HostSession
from tensorguard.ckks.messages import EncryptedActivations, EvaluatedRows
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, PARAMETER_SETS, ParameterSet, get_parameter_set
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.planner import compile_plans, select_plan
from tensorguard.ckks.privacy import total_variation
from tensorguard.ckks.weights import EncodedGroup, GroupWeights

__all__ = [
    "DEFAULT_PARAMETER_SET",
    "PARAMETER_SETS",
    "EncodedGroup",
    "EncryptedActivations",
    "EvaluatedRows",
    "Evaluator",
    "GroupWeights",
    "HostSession",
    "OperationCounters",
    "ParameterSet",
    "Plan",
    "compile_kernels",
    "compile_plans",
    "get_parameter_set",
    "select_plan",
    "total_variation",
]


_WARM_UP_POOL = 1 << 20


def compile_kernels() -> None:
    """Compile every kernel, or load it from numba's cache, by two tiny products, with pools and without.

    Services do it through frames (`tensorguard.session.warm_up`). The first time on a machine takes some seconds.
    """
    parameters = get_parameter_set(DEFAULT_PARAMETER_SET)
    plan = Plan(1, 32, 1)
    group = EncodedGroup(GroupWeights(np.ones((1, 1), np.int32), (0,), 1.0), parameters, [plan])
    seed, session_id = os.urandom(32), b"compile"
    host = HostSession.create(parameters, seed, session_id, pool_bytes=_WARM_UP_POOL)
    evaluator = Evaluator(parameters, host.public_key, seed, session_id, pool_bytes=_WARM_UP_POOL)
    for _ in range(2):
        encrypted = host.encrypt(np.ones((1, 1)), plan, 1.0)
        response = evaluator.evaluate(group, plan, 1, encrypted.ids, encrypted.seeds, encrypted.b)
        host.decrypt(encrypted, response, 1, np.ones(1))
        host.pool.fill()
        evaluator.pool.fill()
    evaluator.pool.close()
    host.close()
