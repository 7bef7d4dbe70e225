"""The engine of this project, `tensorguard.ckks`: numpy and compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable

from tensorguard.ckks.evaluator import Evaluator
from tensorguard.ckks.filler import Filler
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.ring import Residues
from tensorguard.ckks.weights import EncodedGroup, GroupWeights
from tensorguard.engines.interface import EngineOptions


class CpuEngine:
    """Implements `Engine`. Pools of all keys are filled by one thread, as `Filler` says."""

    name = "cpu"

    def __init__(self, options: EngineOptions) -> None:
        """Raises ConfigurationError if pools are asked for and this machine cannot tell when it is idle."""
        self._options = options
        self._filler = Filler(options.pool_bytes) if options.pool_bytes_per_key else None

    def encode(self, weights: GroupWeights, parameters: ParameterSet, plans: Iterable[Plan]) -> EncodedGroup:
        return EncodedGroup(weights, parameters, plans)

    def evaluator(self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes) -> Evaluator:
        threads, pool_bytes = self._options.threads, self._options.pool_bytes_per_key
        evaluator = Evaluator(parameters, pk0, pk1_seed, session_id, threads=threads, pool_bytes=pool_bytes)
        if self._filler is not None:
            self._filler.add(evaluator.pool)
        return evaluator

    def close(self) -> None:
        if self._filler is not None:
            self._filler.close()
