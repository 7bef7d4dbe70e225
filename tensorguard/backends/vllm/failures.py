"""How a failed delta ends exactly the requests it concerns, and nothing computed without its delta leaves.

The path, inside the engine's own processes and in the order of one step:

1. a hook marks the requests of the forward pass (`ForwardPass.failed`); 2. the worker hands their ids to
the scheduler with the step's output (`StepOutput`), their sampled tokens removed; 3. `FailClosedScheduler`,
vLLM's scheduler otherwise, finishes them with FINISHED_ERROR *before* it looks at the step's tokens, drops
the KV blocks they wrote from the prefix cache, and emits one token-free output whose stop reason is
`DELTA_UNAVAILABLE`; 4. in the serving process `tensorguard.backends.vllm.routing` turns that output into
`DeltaUnavailable`.

Steps 2 and 3 happen before the next step is scheduled, because async scheduling is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from vllm.exceptions import RetryableRequestError
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tensorguard.backends.vllm.lifetime import exit_with_parent
from tensorguard.errors import DeltaUnavailableError

DELTA_UNAVAILABLE = DeltaUnavailableError.reason
"""Stop reason of a request that ended because a delta was missing; also the error code users see."""

MESSAGE = "The adapter is unavailable at the moment; nothing was generated without it. Please try again."


class DeltaUnavailable(  # noqa: N818 (the name of the reason)
    DeltaUnavailableError, RetryableRequestError
):
    """A request through an adapter ended because a delta could not be had.

    Also one of vLLM's own errors, so that its serving code ends a stream with it instead of logging a defect.
    """

    def __init__(self) -> None:
        super().__init__(MESSAGE)


@dataclasses.dataclass
class StepOutput(ModelRunnerOutput):
    """A step's output plus the requests in it that lack a delta."""

    failed_request_ids: frozenset[str] = frozenset()

    @classmethod
    def without(cls, output: ModelRunnerOutput, failed: frozenset[str]) -> StepOutput:
        """The same output, with the tokens of the failed requests removed."""
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(ModelRunnerOutput)}
        if output.sampled_token_ids:
            fields["sampled_token_ids"] = [
                [] if request_id in failed else tokens
                for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True)
            ]
        return cls(**fields, failed_request_ids=failed)


class FailClosedScheduler(Scheduler):
    """vLLM's scheduler; requests that lack a delta end in the step in which it was missed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failed: frozenset[str] = getattr(model_runner_output, "failed_request_ids", frozenset())
        endings = self._end(failed) if failed else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, ending in endings:
            if client in outputs:
                outputs[client].outputs.append(ending)
            else:
                outputs[client] = EngineCoreOutputs(outputs=[ending])
        return outputs

    def _end(self, request_ids: Iterable[str]) -> list[tuple[int, EngineCoreOutput]]:
        present = [request_id for request_id in request_ids if request_id in self.requests]
        for request_id in present:
            # Blocks enter the prefix cache when they are scheduled, before they are computed.
            for blocks in self.kv_cache_manager.get_block_ids(request_id):
                self.kv_cache_manager.evict_blocks(set(blocks))
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=DELTA_UNAVAILABLE,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                ),
            )
            for request in self.finish_requests(present, RequestStatus.FINISHED_ERROR)
        ]
