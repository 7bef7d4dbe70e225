"""HE-LoRA inside vLLM's linear layers.

`HookedLinearMethod` replaces a fused linear layer's `quant_method`. Its `apply` gathers the rows of adapted
requests and starts the remote product, runs the layer's own product while the coprocessor works, then waits
and adds delta = z @ U^T (in full mode: z) to those rows alone. Layers outside the attached adapters' groups are
not touched, and passes that vLLM runs for itself (profiling) have no adapted rows. In a compiled model the same
happens inside an operation of its own (`tensorguard.backends.vllm.compiled`).

When a delta cannot be had, all requests of that adapter in the forward pass are marked as failed and the
adapter is left out of the rest of the pass. What the pass computes for them is wrong from there on, so
nothing of it may leave: `tensorguard.backends.vllm.failures` sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from tensorguard.backends.vllm.compiled import call_hooked_linear
from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, told_reason
from tensorguard.backends.vllm.rows import AdapterRows, map_rows
from tensorguard.errors import InternalError, TenSafeError

log = structlog.get_logger(__name__)


class PendingDelta(Protocol):
    """An encrypted product under way."""

    def wait(self, timeout: float) -> npt.NDArray[np.floating[Any]]:
        """z [T, rows]. Raises DeltaUnavailableError, LeaseExpiredError or BudgetExhaustedError."""
        ...


class DeltaSource(Protocol):
    """One attached adapter, as the hooks see it."""

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> PendingDelta:
        """Encrypt x (float32 [T, d_in]) and send it. Raises DeltaUnavailableError. Does not keep x."""
        ...


@dataclass(frozen=True, slots=True)
class ProjectionBasis:
    """Where one projection's part of z goes: columns `outputs` of the fused output get z[:, inputs] @
    basis, or in full mode z[:, inputs] itself."""

    inputs: slice
    outputs: slice
    basis: torch.Tensor | None
    """U^T, float32 [rank, d_out], on the layer's device; None in full mode."""


@dataclass(slots=True)
class HookCounters:
    """What the hooks did since start, for status pages."""

    forward_passes: int = 0
    adapted_rows: int = 0
    adapted_requests: int = 0
    """Counted in every pass: with `adapted_rows`, how many rows a request has in a step."""
    calls: int = 0
    failed_calls: int = 0
    hook_seconds: float = 0.0
    base_seconds: float = 0.0


@dataclass(slots=True)
class ForwardPass:
    """The adapted rows of the forward pass that is running, and the requests of it that failed."""

    sources: dict[str, DeltaSource]
    """By the adapter's key; changes between two steps only."""
    device: torch.device
    timeout: float
    active: list[AdapterRows] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Request id -> the reason its user is told."""
    counters: HookCounters = field(default_factory=HookCounters)

    def start(self, request_ids: Sequence[str], adapters: Sequence[str | None], row_starts: np.ndarray) -> None:
        """Note whose rows are whose. A request whose adapter is not attached fails at once."""
        self.active = map_rows(request_ids, adapters, row_starts, self.device)
        self.counters.forward_passes += 1
        for rows in self.active[:]:
            self.counters.adapted_rows += rows.count
            self.counters.adapted_requests += len(rows.request_ids)
            if rows.adapter not in self.sources:
                self.fail(rows, DELTA_UNAVAILABLE)

    def finish(self) -> None:
        """Forget the rows; `failed` stays until it is taken."""
        self.active = []

    def fail(self, rows: AdapterRows, reason: str) -> None:
        """Give up on all requests of one adapter in this pass.

        Not only on one request: requests of the same adapter may read KV blocks that a failed one is just
        writing.
        """
        self.failed.update(dict.fromkeys(rows.request_ids, reason))
        self.active = [other for other in self.active if other is not rows]

    def take_failed(self) -> dict[str, str]:
        """The requests that failed since the last call, each with the reason its user is told."""
        failed, self.failed = self.failed, {}
        return failed


class HookedLinearMethod(LinearMethodBase):
    """A linear layer's own method, plus the deltas of whichever adapters the batch asks for.

    bases: per adapter key, the projections that this layer's group has in that adapter; changes between two steps
    only.
    """

    def __init__(
        self,
        original: LinearMethodBase,
        layer_number: int,
        group: str,
        bases: Mapping[str, tuple[ProjectionBasis, ...]],
        forward_pass: ForwardPass,
    ) -> None:
        self.original = original
        self.layer_number = layer_number
        self.group = group
        self.bases = dict(bases)
        self.forward_pass = forward_pass

    @property
    def name(self) -> str:
        """What a compiled model knows the layer by."""
        return f"hooked.{self.layer_number}.{self.group}"

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.original.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.original.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return call_hooked_linear(layer, x, bias, self.name)
        return self.compute(layer, x, bias)

    def compute(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output [tokens, d_out] with the deltas of this step's adapted rows."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InternalError("a hooked layer was captured into a CUDA graph, which would leave its deltas out")
        if not self.forward_pass.active:
            return self.original.apply(layer, x, bias)
        counters = self.forward_pass.counters
        started = time.perf_counter()
        pending = self._begin(x)
        sent = time.perf_counter()
        output = self.original.apply(layer, x, bias)
        computed = time.perf_counter()
        # One deadline for all: a coprocessor that is waited for in vain takes no time from the others, whose deltas
        # arrive meanwhile.
        deadline = sent + self.forward_pass.timeout
        for rows, delta in pending:
            self._add(rows, delta, output, deadline)
        counters.base_seconds += computed - sent
        counters.hook_seconds += time.perf_counter() - computed + sent - started
        return output

    def _begin(self, x: torch.Tensor) -> list[tuple[AdapterRows, PendingDelta]]:
        pending = []
        for rows in self.forward_pass.active[:]:
            if rows.adapter not in self.bases:
                continue
            activations = x[rows.index].to(torch.float32).cpu().numpy()
            self.forward_pass.counters.calls += 1
            try:
                source = self.forward_pass.sources[rows.adapter]
                pending.append((rows, source.begin(self.layer_number, self.group, activations)))
            except TenSafeError as error:
                self._give_up(rows, error)
        return pending

    def _add(self, rows: AdapterRows, delta: PendingDelta, output: torch.Tensor, deadline: float) -> None:
        try:
            z = delta.wait(max(0.0, deadline - time.perf_counter()))
        except TenSafeError as error:
            self._give_up(rows, error)
            return
        add_delta(output, rows.index, torch.from_numpy(z).to(output.device, torch.float32), self.bases[rows.adapter])

    def _give_up(self, rows: AdapterRows, error: TenSafeError) -> None:
        self.forward_pass.counters.failed_calls += 1
        self.forward_pass.fail(rows, told_reason(error))
        # The cause stays in this process's log.
        log.warning(
            "delta_unavailable",
            adapter=rows.adapter,
            layer=self.layer_number,
            group=self.group,
            requests=len(rows.request_ids),
            reason=error.reason,
        )


def add_delta(
    output: torch.Tensor, index: slice | torch.Tensor, z: torch.Tensor, projections: Iterable[ProjectionBasis]
) -> None:
    """output[index, p.outputs] += z[:, p.inputs] @ p.basis, in full mode without basis, in float32 whatever the
    output's dtype.

    output: [tokens, d_out]; z: float32 [T, rows] with T the number of rows that `index` names.
    """
    for projection in projections:
        delta = z[:, projection.inputs]
        if projection.basis is not None:
            delta = torch.mm(delta, projection.basis)
        columns = output[:, projection.outputs]
        if isinstance(index, slice):
            columns[index] += delta
        else:
            columns[index] = (columns[index] + delta).to(output.dtype)
