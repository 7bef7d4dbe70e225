"""How a failed delta ends exactly the requests it concerns, and nothing computed without its delta leaves.

The path, inside the engine's own processes and in the order of one step:

1. a hook marks the requests of the forward pass (`ForwardPass.failed`); 2. the worker hands their ids to
the scheduler with the step's output (`StepOutput`), their sampled tokens removed; 3. `FailClosedScheduler`,
vLLM's scheduler otherwise, finishes them with FINISHED_ERROR *before* it looks at the step's tokens, drops
the KV blocks they wrote from the prefix cache, and emits one token-free output whose stop reason is the
reason their users are told; 4. in the serving process `tensorguard.backends.vllm.routing` turns that output
into one of `ENDINGS`.

Steps 2 and 3 happen before the next step is scheduled, because async scheduling is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.exceptions import GenerationError, RetryableRequestError
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tensorguard.backends.vllm.lifetime import end_with_parent
from tensorguard.errors import BudgetExhaustedError, DeltaUnavailableError, LeaseExpiredError, TenSafeError

DELTA_UNAVAILABLE = DeltaUnavailableError.reason
"""Reason of every failed check, decryption or connection; also the error code users see."""


# Each is also one of vLLM's own errors, so that its serving code ends a stream with it instead of logging a defect.
class DeltaUnavailable(DeltaUnavailableError, RetryableRequestError):  # noqa: N818 (the name of the reason)
    """A request through an adapter ended because a delta could not be had."""

    def __init__(self) -> None:
        super().__init__(
            "The adapter is unavailable at the moment; nothing was generated without it. Please try again."
        )


class LeaseExpired(LeaseExpiredError, RetryableRequestError):  # noqa: N818
    """A request ended because the adapter's coprocessor has no lease on it any more."""

    def __init__(self) -> None:
        super().__init__(
            "The lease on this adapter is over at its coprocessor; nothing was generated without it. It is served "
            "again when its owner's attestor renews the lease."
        )


class BudgetExhausted(BudgetExhaustedError, GenerationError):  # noqa: N818
    """A request ended because the adapter's token budget is spent."""

    def __init__(self) -> None:
        super().__init__(
            "The token budget of this adapter is spent; nothing was generated without it. Its owner can grant more."
        )


ENDINGS: Mapping[str, type[DeltaUnavailable | LeaseExpired | BudgetExhausted]] = {
    kind.reason: kind for kind in (DeltaUnavailable, LeaseExpired, BudgetExhausted)
}
"""Stop reason of a request that lacked a delta -> what its user gets."""


def told_reason(error: TenSafeError) -> str:
    """What users learn of a missing delta. What a coprocessor refuses for the adapter's sake has a reason of its own,
    which is the coprocessor's own word; everything else looks alike, so that failures tell it nothing about the key.
    """
    return error.reason if isinstance(error, (LeaseExpiredError, BudgetExhaustedError)) else DELTA_UNAVAILABLE


@dataclasses.dataclass
class StepOutput(ModelRunnerOutput):
    """A step's output plus the requests in it that lack a delta, each with its reason (a key of `ENDINGS`)."""

    failed_requests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def without(cls, output: ModelRunnerOutput, failed: Mapping[str, str]) -> StepOutput:
        """The same output, with the tokens of the failed requests removed."""
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(ModelRunnerOutput)}
        if output.sampled_token_ids:
            fields["sampled_token_ids"] = [
                [] if request_id in failed else tokens
                for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True)
            ]
        return cls(**fields, failed_requests=failed)


class FailClosedScheduler(Scheduler):
    """vLLM's scheduler; requests that lack a delta end in the step in which it was missed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        self._in_step: frozenset[str] = frozenset()
        self._left_behind: dict[str, set[int]] = {}
        """KV blocks of requests that ended while the step that writes them was running."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        self._in_step = frozenset(output.num_scheduled_tokens)
        self._left_behind = {}
        return output

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        # Callers go away at any time: also between a step's forward pass and the look at its output, and then
        # nothing else remembers where a request that lacked a delta has written.
        blocks = {name: self._blocks(name) for name in self._in_step if name in self.requests}
        finished = super().finish_requests(request_ids, finished_status)
        self._left_behind |= {r.request_id: blocks[r.request_id] for r in finished if r.request_id in blocks}
        return finished

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failed: Mapping[str, str] = getattr(model_runner_output, "failed_requests", {})
        endings = self._end(failed) if failed else []
        self._in_step = frozenset()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, ending in endings:
            if client in outputs:
                outputs[client].outputs.append(ending)
            else:
                outputs[client] = EngineCoreOutputs(outputs=[ending])
        return outputs

    def _end(self, failed: Mapping[str, str]) -> list[tuple[int, EngineCoreOutput]]:
        finished = self.finish_requests(failed, RequestStatus.FINISHED_ERROR)
        for request_id in failed:
            # Blocks enter the prefix cache when they are scheduled, before they are computed.
            self.kv_cache_manager.evict_blocks(self._left_behind.get(request_id, set()))
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=failed[request.request_id],
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                ),
            )
            for request in finished
        ]

    def _blocks(self, request_id: str) -> set[int]:
        return {block for group in self.kv_cache_manager.get_block_ids(request_id) for block in group}
