"""CKKS with coefficient encoding for LoRA products, without rotations. Protocol: docs/protocol.md."""

from __future__ import annotations

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
    "compile_plans",
    "get_parameter_set",
    "select_plan",
    "total_variation",
]
