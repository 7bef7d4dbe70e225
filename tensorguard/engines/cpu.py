"""The engine of this project, `tensorguard.ckks`: numpy and compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensorguard.ckks.evaluator import Evaluator
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.ring import Residues
from tensorguard.ckks.weights import EncodedGroup, GroupWeights
from tensorguard.engines.interface import EngineOptions


@dataclass(frozen=True, slots=True)
class CpuEngine:
    """Implements `Engine`."""

    options: EngineOptions
    name: str = "cpu"

    def encode(self, weights: GroupWeights, parameters: ParameterSet, plans: Iterable[Plan]) -> EncodedGroup:
        return EncodedGroup(weights, parameters, plans)

    def evaluator(self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes) -> Evaluator:
        return Evaluator(parameters, pk0, pk1_seed, session_id, threads=self.options.threads)
