"""The hook on small layers: who is changed, in which order, and what happens without a delta."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from tensorguard.backends.vllm.hooks import ForwardPass, HookedLinearMethod, ProjectionBasis, add_delta
from tensorguard.errors import BudgetExhaustedError, DeltaUnavailableError, InvalidInputError, TenSafeError

CPU = torch.device("cpu")
D_IN, D_OUT, RANK = 6, 10, 2


class Plain(LinearMethodBase):
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("create")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.events.append("process")

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.events.append("base")
        return torch.nn.functional.linear(x, layer.weight, bias)


class Source:
    """z = A x; records its calls, fails where told to."""

    def __init__(self, name: str, events: list[str], seed: int) -> None:
        self.name, self.events = name, events
        self.a = np.random.default_rng(seed).standard_normal((2 * RANK, D_IN))
        self.fail_begin: TenSafeError | None = None
        self.fail_wait: TenSafeError | None = None
        self.calls = 0

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> Source.Pending:
        self.events.append(f"begin {self.name} {len(x)}")
        self.calls += 1
        assert x.dtype == np.float32
        if self.fail_begin:
            raise self.fail_begin
        return Source.Pending(self, x.astype(np.float64) @ self.a.T)

    class Pending:
        def __init__(self, source: Source, z: npt.NDArray[np.float64]) -> None:
            self.source, self.z = source, z

        def wait(self, timeout: float) -> npt.NDArray[np.float64]:
            self.source.events.append(f"wait {self.source.name}")
            if self.source.fail_wait:
                raise self.source.fail_wait
            return self.z


class Bench:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.events: list[str] = []
        self.layer = torch.nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype).requires_grad_(False)
        self.sources = {name: Source(name, self.events, i) for i, name in enumerate(("a", "b"))}
        # Rows 0..1 of z are for outputs 0..3, rows 2..3 for outputs 6..9; outputs 4 and 5 have no adapter.
        self.bases = (
            ProjectionBasis(slice(0, 2), slice(0, 4), torch.randn(RANK, 4)),
            ProjectionBasis(slice(2, 4), slice(6, 10), torch.randn(RANK, 4)),
        )
        self.forward = ForwardPass(self.sources, CPU, 1.0)
        bases = {"a": self.bases, "b": self.bases}
        self.hook = HookedLinearMethod(Plain(self.events), 3, "qkv", bases, self.forward)

    def start(self, *adapters: str | None, counts: tuple[int, ...] | None = None) -> int:
        counts = counts or (1,) * len(adapters)
        ids = [f"r{i}" for i in range(len(adapters))]
        self.forward.start(ids, adapters, np.concatenate([[0], np.cumsum(counts)]))
        return sum(counts)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        z = torch.from_numpy(x.double().numpy() @ self.sources[name].a.T).float()
        delta = torch.zeros(len(x), D_OUT)
        for p in self.bases:
            delta[:, p.outputs] += z[:, p.inputs] @ p.basis
        return delta


def test_only_adapted_rows_change_each_by_its_own_adapter() -> None:
    bench = Bench()
    tokens = bench.start(None, "a", "b", None, "a", counts=(2, 3, 1, 1, 2))
    x = torch.randn(tokens, D_IN)
    base = x @ bench.layer.weight.T
    out = bench.hook.apply(bench.layer, x)
    owners = [None, None, "a", "a", "a", "b", None, "a", "a"]
    for row, owner in enumerate(owners):
        expected = base[row] if owner is None else base[row] + bench.delta(owner, x[row : row + 1])[0]
        torch.testing.assert_close(out[row], expected)
        if owner is None:
            assert torch.equal(out[row], base[row])
    assert torch.equal(out[:, 4:6], base[:, 4:6])


def test_padding_rows_are_neither_sent_nor_changed() -> None:
    """Graphs run on batches that are padded to a size they were captured for."""
    bench = Bench()
    tokens = bench.start("a", None, "b", "a", counts=(2, 1, 1, 2))
    x = torch.randn(tokens + 10, D_IN)
    x[tokens:] = torch.nan
    out = bench.hook.apply(bench.layer, x)
    assert bench.events == ["begin a 4", "begin b 1", "base", "wait a", "wait b"]
    assert not out[:tokens].isnan().any()
    assert torch.equal(out[tokens:].isnan(), (x @ bench.layer.weight.T)[tokens:].isnan())
    bench.start("b")
    bench.hook.apply(bench.layer, x)
    assert bench.events[5:] == ["begin b 1", "base", "wait b"]


def test_rows_and_requests_are_counted() -> None:
    bench = Bench()
    bench.start(None, "a", "b", "a", counts=(2, 4, 1, 3))
    bench.start("a", counts=(4,))
    counters = bench.forward.counters
    assert (counters.forward_passes, counters.adapted_rows, counters.adapted_requests) == (2, 12, 4)


def test_requests_go_out_before_the_base_product_and_are_awaited_after_it() -> None:
    bench = Bench()
    bench.start("a", "b", None)
    bench.hook.apply(bench.layer, torch.randn(3, D_IN))
    assert bench.events == ["begin a 1", "begin b 1", "base", "wait a", "wait b"]


def test_passes_without_adapted_rows_only_run_the_base_product() -> None:
    bench = Bench()
    bench.hook.apply(bench.layer, torch.randn(3, D_IN))  # profiling: nothing was started
    bench.start(None, None)
    bench.hook.apply(bench.layer, torch.randn(2, D_IN))
    bench.start("a")
    bench.forward.finish()
    bench.hook.apply(bench.layer, torch.randn(1, D_IN))
    assert bench.events == ["base"] * 3


def test_a_layer_that_an_adapter_does_not_have_is_left_alone() -> None:
    bench = Bench()
    del bench.hook.bases["b"]
    bench.start("a", "b")
    x = torch.randn(2, D_IN)
    out = bench.hook.apply(bench.layer, x)
    assert torch.equal(out[1], (x @ bench.layer.weight.T)[1])
    assert "begin b 1" not in bench.events
    assert not bench.forward.failed


@pytest.mark.parametrize("where", ["fail_begin", "fail_wait"])
def test_a_missing_delta_fails_the_adapters_requests_and_ends_its_calls(where: str) -> None:
    bench = Bench()
    bench.start("a", None, "b", "a")
    setattr(bench.sources["a"], where, DeltaUnavailableError("x"))
    x = torch.randn(4, D_IN)
    out = bench.hook.apply(bench.layer, x)
    base = x @ bench.layer.weight.T
    assert torch.equal(out[1], base[1])
    torch.testing.assert_close(out[2], base[2] + bench.delta("b", x[2:3])[0])
    bench.hook.apply(bench.layer, x)
    assert (bench.sources["a"].calls, bench.sources["b"].calls) == (1, 2)
    assert bench.forward.counters.failed_calls == 1
    bench.forward.finish()
    assert bench.forward.take_failed() == {"r0": "delta_unavailable", "r3": "delta_unavailable"}
    assert bench.forward.take_failed() == {}


def test_requests_are_told_only_what_the_coprocessor_said_of_the_adapter() -> None:
    bench = Bench()
    bench.start("a", "b")
    bench.sources["a"].fail_wait = BudgetExhaustedError("x")
    bench.sources["b"].fail_begin = InvalidInputError("x")
    bench.hook.apply(bench.layer, torch.randn(2, D_IN))
    assert bench.forward.take_failed() == {"r0": "budget_exhausted", "r1": "delta_unavailable"}


def test_all_adapters_of_a_step_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is waited for in vain takes none of the others' time: their deltas arrived meanwhile."""
    bench = Bench()
    bench.start("a", "b")
    waits: list[float] = []

    def stalled(pending: Source.Pending, timeout: float) -> npt.NDArray[np.float64]:
        waits.append(timeout)
        if pending.source.name == "a":
            time.sleep(0.05)
            raise DeltaUnavailableError("silent")
        return pending.z

    monkeypatch.setattr(Source.Pending, "wait", stalled)
    x = torch.randn(2, D_IN)
    out = bench.hook.apply(bench.layer, x)
    torch.testing.assert_close(out[1], (x @ bench.layer.weight.T)[1] + bench.delta("b", x[1:])[0])
    assert waits[0] <= 1.0 and waits[1] <= waits[0] - 0.05
    assert set(bench.forward.take_failed()) == {"r0"}


def test_an_unknown_adapter_fails_at_once() -> None:
    bench = Bench()
    bench.start("nobody", "a")
    assert bench.forward.take_failed() == {"r0": "delta_unavailable"}
    bench.hook.apply(bench.layer, torch.randn(2, D_IN))
    assert bench.events == ["begin a 1", "base", "wait a"]


def test_an_error_that_is_not_ours_is_not_swallowed() -> None:
    bench = Bench()
    bench.start("a")
    bench.sources["a"].fail_wait = ValueError("a defect")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="a defect"):
        bench.hook.apply(bench.layer, torch.randn(1, D_IN))


def test_weights_stay_the_original_methods_business() -> None:
    bench = Bench()
    bench.hook.create_weights(bench.layer)
    bench.hook.process_weights_after_loading(bench.layer)
    assert bench.events == ["create", "process"]
    assert isinstance(bench.hook, LinearMethodBase)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([0, 2])])
def test_deltas_are_added_in_float32(index: slice | torch.Tensor) -> None:
    """In bfloat16 the sum is rounded once, not the delta first."""
    out = torch.full((3, 4), 1.0, dtype=torch.bfloat16)
    basis = ProjectionBasis(slice(0, 1), slice(0, 4), torch.full((1, 4), 1.0))
    # Rounded to bfloat16 first, z would be 0.00390625 and the sum would stay 1.0 (ties to even).
    add_delta(out, index, torch.full((2, 1), 0.00391), (basis,))
    changed = torch.zeros(3, dtype=torch.bool)
    changed[index] = True
    assert (out[changed] == 1.0078125).all()
    assert (out[~changed] == 1.0).all()


def test_full_mode_adds_the_deltas_themselves() -> None:
    output, z = torch.ones(3, D_OUT), torch.randn(2, 6)
    projections = (ProjectionBasis(slice(0, 4), slice(0, 4), None), ProjectionBasis(slice(4, 6), slice(8, 10), None))
    add_delta(output, torch.tensor([0, 2]), z, projections)
    expected = torch.ones(3, D_OUT)
    expected[[0, 2], :4] += z[:, :4]
    expected[[0, 2], 8:] += z[:, 4:]
    torch.testing.assert_close(output, expected)
