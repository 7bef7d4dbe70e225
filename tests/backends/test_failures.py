"""What crosses from the worker to the scheduler, and what users get."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GenerationError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tensorguard.backends.vllm.failures import (
    DELTA_UNAVAILABLE,
    DeltaUnavailable,
    FailClosedScheduler,
    StepOutput,
)
from tensorguard.errors import DeltaUnavailableError
from tensorguard.rpc.status import http_status


def step() -> ModelRunnerOutput:
    return ModelRunnerOutput(
        req_ids=["a", "b", "c"],
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        sampled_token_ids=[[1], [2], [3]],
    )


def test_tokens_of_failed_requests_do_not_cross() -> None:
    output = StepOutput.without(step(), frozenset({"b"}))
    assert output.sampled_token_ids == [[1], [], [3]]
    again = pickle.loads(pickle.dumps(output))
    assert again.failed_request_ids == {"b"}
    assert again.req_id_to_index == step().req_id_to_index


def test_a_chunk_of_a_prompt_has_no_tokens_to_remove() -> None:
    empty = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    output = StepOutput.without(empty, frozenset({"a"}))
    assert (output.sampled_token_ids, output.failed_request_ids) == ([], {"a"})


class Blocks:
    def __init__(self) -> None:
        self.evicted: list[set[int]] = []

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return ([1, 2] if request_id == "a" else [7],)

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted.append(blocks)


def scheduler(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A FailClosedScheduler without vLLM's state: its two methods, and a base class that records."""
    events: list[str] = []
    made: Any = FailClosedScheduler.__new__(FailClosedScheduler)
    made.kv_cache_manager = Blocks()
    made.requests = {
        name: SimpleNamespace(request_id=name, client_index=client, trace_headers=None, take_events=lambda: None)
        for name, client in (("a", 0), ("b", 1), ("c", 0))
    }

    def finish_requests(ids: list[str], status: RequestStatus) -> list[Any]:
        events.append(f"finish {sorted(ids)} {status.name} after {len(made.kv_cache_manager.evicted)} evictions")
        return [made.requests.pop(name) for name in ids]

    def update(self: Any, scheduled: Any, output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        events.append(f"step {sorted(self.requests)}")
        return {0: EngineCoreOutputs(outputs=[EngineCoreOutput(request_id="c", new_token_ids=[3])])}

    made.finish_requests = finish_requests
    monkeypatch.setattr(Scheduler, "update_from_output", update)
    return made, events


def test_failed_requests_end_before_the_steps_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made, events = scheduler(monkeypatch)
    outputs = made.update_from_output(None, StepOutput.without(step(), frozenset({"a", "b", "gone"})))
    assert events == ["finish ['a', 'b'] FINISHED_ERROR after 2 evictions", "step ['c']"]
    assert sorted(map(sorted, made.kv_cache_manager.evicted)) == [[1, 2], [7]]
    ended = {o.request_id: o for client in outputs.values() for o in client.outputs if o.finish_reason}
    assert sorted(ended) == ["a", "b"]
    assert [o.request_id for o in outputs[1].outputs] == ["b"]
    for output in ended.values():
        assert output.new_token_ids == []
        assert (output.finish_reason, output.stop_reason) == (FinishReason.ERROR, DELTA_UNAVAILABLE)


def test_steps_without_failures_are_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made, events = scheduler(monkeypatch)
    outputs = made.update_from_output(None, step())
    assert events == ["step ['a', 'b', 'c']"]
    assert [o.request_id for o in outputs[0].outputs] == ["c"]


def test_the_error_is_both_ours_and_vllms() -> None:
    error = DeltaUnavailable()
    assert isinstance(error, DeltaUnavailableError)
    assert isinstance(error, GenerationError)
    assert (error.reason, http_status(error), error.status_code) == ("delta_unavailable", 503, 503)
