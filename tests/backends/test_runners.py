"""Both model runners announce the same batches: random steps with chunks, preemption and padding.

The V1 runner also runs in the tests that start an engine. The V2 runner needs a GPU: here its own batch and request
structures are filled as its code fills them, by a runner that only schedules.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1Runner

from tensorguard.backends.vllm.hooks import ForwardPass
from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT
from tensorguard.backends.vllm.runners import watch
from tensorguard.errors import ConfigurationError

CPU = torch.device("cpu")
PADDED_ROWS = 512


def parameters(adapter: str | None) -> SamplingParams:
    return SamplingParams(extra_args=None if adapter is None else {ADAPTER_ARGUMENT: adapter})


def config(**changes: Any) -> SimpleNamespace:
    options = {
        "async_scheduling": False,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "adaptive": False,
        **changes,
    }
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=options["async_scheduling"]),
        parallel_config=SimpleNamespace(**{n: options[n] for n in list(options)[1:4]}),
        speculative_config=SimpleNamespace(enable_adaptive_verification=options["adaptive"]),
    )


@dataclasses.dataclass
class Step:
    """What the scheduler decided: rows per scheduled request, and which of them the runner has not seen (lately)."""

    counts: dict[str, int]
    new: dict[str, str | None]
    finished: set[str] = dataclasses.field(default_factory=set)
    preempted: set[str] = dataclasses.field(default_factory=set)


class Runner(Protocol):
    seen: list[tuple[str, tuple[str, ...], list[int]]]

    def step(self, step: Step) -> None: ...


def note(runner: Any) -> None:
    rows = torch.arange(PADDED_ROWS)
    runner.seen = [(a.adapter, a.request_ids, rows[a.index].tolist()) for a in runner.forward_pass.active]


class FakeV1:
    def __init__(self, forward_pass: ForwardPass, **options: Any) -> None:
        self.vllm_config = config(**options)
        self.forward_pass, self.seen = forward_pass, []
        self.requests: dict[str, Any] = {}
        # As vLLM keeps them: longer than the batch, with what earlier steps left behind.
        self.input_batch = SimpleNamespace(req_ids=[], num_reqs=0)
        self.query_start_loc = SimpleNamespace(np=np.full(64, 7, np.int32))

    def step(self, step: Step) -> None:
        for request_id in step.finished:
            self.requests.pop(request_id, None)
        for request_id, adapter in step.new.items():
            self.requests[request_id] = SimpleNamespace(sampling_params=parameters(adapter))
        self.input_batch.req_ids = [*step.counts, "left over"]
        self.input_batch.num_reqs = len(step.counts)
        starts = np.cumsum([0, *step.counts.values()])
        self.query_start_loc.np[: len(starts)] = starts
        self.query_start_loc.np[len(starts) :] = starts[-1]
        if step.counts:
            self._model_forward()

    def _model_forward(self) -> None:
        note(self)


class FakeV2:
    def __init__(self, forward_pass: ForwardPass, **options: Any) -> None:
        self.vllm_config = config(**options)
        self.forward_pass, self.seen = forward_pass, []
        self.buffers = InputBuffers(64, PADDED_ROWS, CPU)

    def step(self, step: Step) -> None:
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = step.counts
        output.finished_req_ids, output.preempted_req_ids = step.finished, step.preempted
        output.scheduled_new_reqs = [
            NewRequestData(request_id, [1], [], parameters(adapter), None, ([],), 0, None)
            for request_id, adapter in step.new.items()
        ]
        self.execute_model(output)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        pass

    def prepare_inputs(self, scheduler_output: SchedulerOutput) -> InputBatch:
        counts = np.array(list(scheduler_output.num_scheduled_tokens.values()), np.int32)
        dummy = InputBatch.make_dummy(len(counts), int(counts.sum()), self.buffers)
        # Padded requests own no rows: a graph's request count may be higher than the batch's.
        starts = np.concatenate([[0], np.cumsum(counts), np.full(3, counts.sum())]).astype(np.int32)
        return dataclasses.replace(
            dummy, req_ids=list(scheduler_output.num_scheduled_tokens), query_start_loc_np=starts
        )

    def execute_model(self, scheduler_output: SchedulerOutput, *, dummy_run: bool = False) -> None:
        if dummy_run:
            note(self)
            return
        self.add_requests(scheduler_output)
        if scheduler_output.num_scheduled_tokens:
            self.prepare_inputs(scheduler_output)
            note(self)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[Step, list[str | None]]]:
    """Steps, each with the owner of every row."""
    owner: dict[str, str | None] = {}
    waiting: set[str] = set()
    steps = []
    for number in range(draw(st.integers(1, 6))):
        finished = {r for r in owner if draw(st.integers(0, 3)) == 0}
        waiting -= finished
        owner = {r: a for r, a in owner.items() if r not in finished}
        preempted = {r for r in owner if r not in waiting and draw(st.integers(0, 4)) == 0}
        resumed = {r for r in sorted(waiting) if draw(st.booleans())}
        waiting = (waiting | preempted) - resumed
        fresh = {f"{number}-{i}": draw(st.sampled_from([None, "a", "b"])) for i in range(draw(st.integers(0, 3)))}
        owner |= fresh
        scheduled = draw(st.permutations([r for r in owner if r not in waiting]))
        counts = {r: draw(st.integers(1, 9)) for r in scheduled}
        new = fresh | {r: owner[r] for r in resumed}
        steps.append((Step(counts, new, finished, preempted), [owner[r] for r, n in counts.items() for _ in range(n)]))
    return steps


@pytest.mark.parametrize("kind", [FakeV1, FakeV2])
@given(schedules())
def test_every_step_announces_each_row_to_its_owner(kind: Any, steps: list[tuple[Step, list[str | None]]]) -> None:
    forward_pass = ForwardPass({"a": None, "b": None}, CPU, 1.0)  # type: ignore[dict-item]
    runner = kind(forward_pass)
    watch(runner, forward_pass)
    for step, owners in steps:
        runner.seen = []
        runner.step(step)
        expected = {name: [i for i, owner in enumerate(owners) if owner == name] for name in ("a", "b")}
        assert {adapter: rows for adapter, _, rows in runner.seen} == {n: rows for n, rows in expected.items() if rows}
        assert forward_pass.active == []
    assert not forward_pass.failed


def test_v2s_own_passes_have_no_adapted_rows() -> None:
    forward_pass = ForwardPass({"a": None}, CPU, 1.0)  # type: ignore[dict-item]
    runner = FakeV2(forward_pass)
    watch(runner, forward_pass)
    runner.step(Step({"r": 2}, {"r": "a"}))
    assert runner.seen == [("a", ("r",), [0, 1])]
    runner.execute_model(SchedulerOutput.make_empty(), dummy_run=True)
    assert runner.seen == []


def test_a_pass_that_raises_leaves_no_rows_behind() -> None:
    forward_pass = ForwardPass({"a": None}, CPU, 1.0)  # type: ignore[dict-item]
    for kind, method in ((FakeV1, "_model_forward"), (FakeV2, "execute_model")):
        runner: Any = kind(forward_pass)

        def fail(*_: Any) -> None:
            forward_pass.start(["r"], ["a"], np.array([0, 1]))
            raise ValueError("a defect")

        setattr(runner, method, fail)
        watch(runner, forward_pass)
        with pytest.raises(ValueError, match="a defect"):
            runner.step(Step({"r": 1}, {"r": "a"}))
        assert forward_pass.active == []


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("async_scheduling", True, "async_scheduling"),
        ("pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("prefill_context_parallel_size", 2, "prefill_context_parallel_size"),
        ("use_ubatching", True, "enable_dbo"),
        ("adaptive", True, "enable_adaptive_verification"),
    ],
)
def test_options_that_hide_rows_from_the_hooks_are_refused(option: str, value: Any, named: str) -> None:
    forward_pass = ForwardPass({}, CPU, 1.0)
    for kind in (FakeV1, FakeV2):
        with pytest.raises(ConfigurationError, match=named):
            watch(kind(forward_pass, **{option: value}), forward_pass)


def test_an_unknown_runner_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="SimpleNamespace is not a model runner"):
        watch(SimpleNamespace(vllm_config=config()), ForwardPass({}, CPU, 1.0))


def test_vllms_runners_call_what_is_watched() -> None:
    """The wrapped methods are looked up on the instance, in this order, and take what the wrappers pass on."""
    assert "self._model_forward(" in inspect.getsource(V1Runner.execute_model)
    source = inspect.getsource(V2Runner.execute_model)
    places = [source.index(text) for text in ("self.add_requests(", "self.prepare_inputs(", "self.model(")]
    assert places == sorted(places)
    assert list(inspect.signature(V2Runner.add_requests).parameters) == ["self", "scheduler_output"]
