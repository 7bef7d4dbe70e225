"""Full mode on a matrix of real proportions: what the engine returns is s*B*A*x within the stated errors."""

from __future__ import annotations

import numpy as np
import pytest

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, HostSession, compile_plans, get_parameter_set
from tensorguard.ckks.planner import select_plan
from tensorguard.lora.groups import ERROR_BOUND, build_group
from tests.lora.test_factorisation import module, product

PARAMETERS = get_parameter_set("n4096-q90-w12")
D_IN, D_OUT, RANK = 1024, 1536, 8
SEED, SESSION = bytes(32), b"full mode"


@pytest.mark.parametrize("kind", ["random", "aligned"])
def test_deltas_of_a_large_matrix(kind: str) -> None:
    """The error of encryption alone stays under 2^-14, all errors together under 2^-12 for random inputs and 2^-9 for
    the worst ones, each as a vector relative to |x| |sBA|_F / sqrt(d).
    """
    adapted = module(D_IN, D_OUT, RANK)
    group = build_group(0, "o", {(0, "o_proj"): adapted}, PARAMETERS, mode="full")
    (info,) = group.projections
    assert group.error <= ERROR_BOUND and group.norm_bound == PARAMETERS.norm_bound(D_IN, 16)
    exact = product(adapted)
    if kind == "random":
        x = np.random.default_rng(0).normal(size=(2, D_IN))
    else:  # along what rounding changed most
        x = np.linalg.svd(exact - group.integers * 2.0**-info.scale_exponent, full_matrices=False)[2][:2]
    plan = select_plan(compile_plans(PARAMETERS, D_IN, D_OUT), PARAMETERS, len(x), D_IN, D_OUT)
    weights = GroupWeights(group.integers, (info.scale_exponent,) * D_OUT, group.norm_bound)
    encoded = EncodedGroup(weights, PARAMETERS, [plan])
    host = HostSession.create(PARAMETERS, SEED, SESSION)
    evaluator = Evaluator(PARAMETERS, host.public_key, SEED, SESSION)
    sent = host.encrypt(x, plan, group.norm_bound)
    answer = evaluator.evaluate(encoded, plan, len(x), sent.ids, sent.seeds, sent.b)
    deltas = host.decrypt(sent, answer, D_OUT, weights.row_scales)
    unit = np.linalg.norm(x, axis=1) * np.linalg.norm(exact) / np.sqrt(D_IN)
    of_encryption = np.linalg.norm(deltas - x @ (group.integers * 2.0**-info.scale_exponent).T, axis=1) / unit
    altogether = np.linalg.norm(deltas - x @ exact.T, axis=1) / unit
    assert of_encryption.max() <= 2.0**-14
    assert altogether.max() <= (2.0**-12 if kind == "random" else ERROR_BOUND)
    assert altogether.max() <= group.error
