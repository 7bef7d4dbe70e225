"""What the coprocessor needs from an engine, whoever does the arithmetic.

Messages and parameter sets are those of `tensorguard.ckks`, so that a host cannot tell engines apart by anything but
their time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.evaluator import OperationCounters
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.ring import Residues
from tensorguard.ckks.weights import GroupWeights


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """threads: that share one request. pool_bytes_per_key and pool_bytes: encryptions of zero made ahead in idle time,
    for each host key and over all of them; none with 0 for each.
    """

    threads: int = 1
    pool_bytes_per_key: int = 0
    pool_bytes: int = 0


class EncodedWeights(Protocol):
    """A group's weights, prepared for its plans once and shared by all sessions."""

    @property
    def plans(self) -> frozenset[Plan]: ...
    @property
    def rows(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def parameters(self) -> ParameterSet: ...
    @property
    def nbytes(self) -> int:
        """Bytes of encoded weights held."""


Group = TypeVar("Group", bound=EncodedWeights)
EvaluatedGroup = TypeVar("EvaluatedGroup", bound=EncodedWeights, contravariant=True)


class RequestEvaluator(Protocol[EvaluatedGroup]):
    """Evaluates requests of one host key. Thread-safe; has no secret key and no operation that needs another key."""

    @property
    def counters(self) -> OperationCounters:
        """Operations since it was made."""

    def evaluate(
        self,
        group: EvaluatedGroup,
        plan: Plan,
        tokens: int,
        ids: npt.NDArray[np.uint64],
        seeds: bytes,
        b: Residues,
    ) -> EvaluatedRows:
        """W·x for every token, re-randomised, flooded, modulo p0 (docs/protocol.md, "Evaluation").

        ids uint64 [C], seeds 32·C bytes, b uint32 [C, primes, N], C = plan.uploads(tokens, d_in). Raises
        InvalidInputError for malformed input, unreduced residues or repeated identifiers and NotFoundError for a plan
        that was not compiled into the group.
        """

    def close(self) -> None:
        """Wipe what was made ahead for this key, which is not used any more."""


class Engine(Protocol[Group]):
    """One way to do the arithmetic. Its evaluators take its own groups only."""

    @property
    def name(self) -> str: ...

    def encode(self, weights: GroupWeights, parameters: ParameterSet, plans: Iterable[Plan]) -> Group:
        """The weights, ready for these plans and no others."""

    def evaluator(
        self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes
    ) -> RequestEvaluator[Group]:
        """For one host key. pk0 uint32 [primes, N] reduced, transform domain; pk1_seed 32 bytes and session_id are
        public, agreed by both sides. Raises InvalidInputError for a malformed key.
        """

    def close(self) -> None:
        """Make nothing ahead any more. Evaluators go on."""
