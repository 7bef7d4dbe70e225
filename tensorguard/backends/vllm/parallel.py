"""Tensor parallelism: rank 0 talks to the coprocessors, all ranks add deltas.

Rank 0 alone attests and holds identities, keys and sessions. The other ranks get the shapes and bases of an adapter
when it is attached, and z in each layer; they hold the same activations anyway. What they are sent also says whether
there is a delta, so that all ranks give an adapter up in the same layer: a rank that went on alone would wait for the
others for ever.

Everything goes through the CPU group of vLLM's tensor-parallel ranks: z is decrypted on the CPU, and activations must
come there to be encrypted. Its waits sleep; vLLM's shared-memory collectives spin, which takes the coprocessor's time
where both share a machine.

The inputs of o and down are spread over the ranks. They are gathered on rank 0 and encrypted there. Every rank could
encrypt its own part, which for single tokens takes longer, and would need an identity, a session and a key of its own
(docs/vllm.md has the measurement).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch.distributed import ProcessGroup
from vllm.distributed.parallel_state import get_tp_group

from tensorguard.backends.vllm.attachments import Attachments
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.hooks import DeltaSource, PendingDelta
from tensorguard.backends.vllm.install import AttachedGroup, Attachment, Hooks, Site
from tensorguard.errors import DeltaUnavailableError, InternalError, TenSafeError
from tensorguard.observability.logging import frames_of
from tensorguard.rpc.status import error_of

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that compute a step together. Each method is called by all of them, in the same order."""

    group: ProcessGroup
    """Works on tensors in the CPU's memory."""
    rank: int
    size: int

    @classmethod
    def of_engine(cls) -> Ranks:
        """The tensor-parallel ranks of the vLLM engine that this process is a worker of."""
        group = get_tp_group()
        return cls(group.cpu_group, group.rank_in_group, group.world_size)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, values: npt.NDArray[Any]) -> None:
        """Overwrite `values` with rank 0's, of the same shape and dtype."""
        self.group.broadcast(torch.from_numpy(values), 0).wait()

    def gather(self, part: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """On rank 0 the parts [T, w] of all ranks beside each other, [T, size * w]; None on the others."""
        mine = torch.from_numpy(np.ascontiguousarray(part))
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else []
        self.group.gather(parts, mine, 0).wait()
        return torch.cat(parts, dim=1).numpy() if self.leads else None

    def lead(self, work: Callable[[], Result]) -> Result:
        """Have rank 0 do `work`; its result, which is pickled, or its TenSafeError is every rank's."""
        answer: tuple[str, Any] = ("", None)
        failure: Exception | None = None
        if self.leads:
            try:
                answer = ("result", work())
            except TenSafeError as error:
                answer = ("error", (error.reason, error.message))
            except Exception as error:
                answer, failure = ("error", ("internal", "rank 0 failed; its log has the details")), error
        kind, value = self._share(answer)
        if failure is not None:
            raise failure
        if kind == "error":
            raise error_of(*value) or InternalError(value[1])
        return value

    def all(self, mine: bool) -> bool:
        """Whether it is true on every rank."""
        votes = torch.tensor([int(not mine)])
        self.group.allreduce(votes).wait()
        return int(votes) == 0

    def _share(self, value: Any) -> Any:
        message = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8).copy() if self.leads else None
        size = np.array([0 if message is None else len(message)])
        self.broadcast(size)
        received = np.empty(int(size[0]), np.uint8) if message is None else message
        self.broadcast(received)
        return value if self.leads else pickle.loads(received.data)  # noqa: S301 (from rank 0, whose memory is ours)


@dataclass(frozen=True, slots=True)
class SharedDelta:
    """A product under way, on every rank."""

    ranks: Ranks
    shape: tuple[int, int]
    pending: PendingDelta | None
    """Rank 0's."""

    def wait(self, timeout: float) -> npt.NDArray[np.float32]:
        """z float32 [T, rows], the same on all ranks.

        Without it all of them raise: rank 0, whose output vLLM takes, what its own wait raised, the others
        DeltaUnavailableError.
        """
        count = self.shape[0] * self.shape[1]
        message = np.zeros(count + 1, np.float32)  # z, and 1 if there is one
        try:
            if self.pending is not None:
                message[:count] = self.pending.wait(timeout).reshape(-1)
                message[count] = 1
        finally:
            self.ranks.broadcast(message)
        if message[count] != 1:
            raise DeltaUnavailableError("rank 0 has no delta")
        return message[:count].reshape(self.shape)


@dataclass(frozen=True, slots=True)
class RefusedDelta:
    """A product that was not even begun."""

    error: TenSafeError

    def wait(self, timeout: float) -> npt.NDArray[np.float32]:
        """Raises what kept it from being begun."""
        raise self.error


@dataclass(frozen=True, slots=True)
class SharedDeltas:
    """An adapter on every rank (`DeltaSource`). Calls, and waits, come in the same order on all ranks."""

    ranks: Ranks
    shapes: Mapping[Site, tuple[int, int]]
    """Per layer and group: width of the whole input, and of z."""
    source: DeltaSource | None
    """Rank 0's way to the coprocessor."""

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> PendingDelta:
        """Start with x, float32 [T, d_in], or this rank's part of its columns. Failures show when it is awaited."""
        d_in, rows = self.shapes[layer, group]
        whole = x if x.shape[1] == d_in else self.ranks.gather(x)
        pending: PendingDelta | None = None
        if self.source is not None and whole is not None:
            try:
                pending = self.source.begin(layer, group, whole)
            except TenSafeError as error:
                # The other ranks learn of it where they wait.
                pending = RefusedDelta(error)
        return SharedDelta(self.ranks, (len(x), rows), pending)


def share(ranks: Ranks, attachment: Attachment) -> Attachment:
    """Rank 0's adapter, with its deltas for all ranks."""
    return replace(attachment, source=SharedDeltas(ranks, _shapes(attachment.groups), attachment.source))


def _shapes(groups: Sequence[AttachedGroup]) -> dict[Site, tuple[int, int]]:
    return {(g.layer, g.group): (g.d_in, sum(projection.rank for projection in g.projections)) for g in groups}


class SharedAttachments:
    """The adapters of an engine with several ranks: `Attachments`, attached and detached on all of them."""

    def __init__(self, ranks: Ranks, hooks: Hooks, attachments: Attachments | None) -> None:
        """attachments: rank 0's, whose adapters went through `share`; None on the other ranks."""
        self._ranks = ranks
        self._hooks = hooks
        self._attachments = attachments

    def begin(self, connection: AdapterConnection) -> int:
        """As in `Attachments`; only rank 0's number is one."""
        return 0 if self._attachments is None else self._attachments.begin(connection)

    def outcome(self, ticket: int) -> dict[str, Any] | None:
        """As in `Attachments`, on every rank the same. A finished adapter's bases are sent to the other ranks here."""
        found = self._ranks.lead(lambda: self._outcome(ticket))
        if found is None:
            return None
        description, groups = found
        if not self._ranks.all(self._attachments is not None or self._add(description["key"], groups)):
            self.detach(description["key"])
            raise InternalError("a rank could not take the adapter's bases; the engine's log has the details")
        return description

    def detach(self, key: str) -> None:
        """As in `Attachments`; the other ranks raise nothing."""
        if self._attachments is None:
            self._hooks.remove(key)
        else:
            self._attachments.detach(key)

    def status(self) -> dict[str, Any]:
        """As in `Attachments`; nothing on ranks other than 0."""
        return {} if self._attachments is None else self._attachments.status()

    def close(self) -> None:
        if self._attachments is not None:
            self._attachments.close()

    def _outcome(self, ticket: int) -> tuple[dict[str, Any], tuple[AttachedGroup, ...]] | None:
        assert self._attachments is not None
        description = self._attachments.outcome(ticket)
        return None if description is None else (description, self._attachments.groups(description["key"]))

    def _add(self, key: str, groups: tuple[AttachedGroup, ...]) -> bool:
        try:
            source = SharedDeltas(self._ranks, _shapes(groups), None)
            self._hooks.add(self._hooks.fit(Attachment(key, groups, source)))
        except Exception as error:
            log.error("attach_failed", error_type=type(error).__name__, frames=frames_of(error))
            return False
        return True
