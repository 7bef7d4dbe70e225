"""Several ranks, each a thread with its own model shard and a real gloo group: sums, failures, attaching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo

from tensorguard.backends.vllm.attachments import Attachments
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.hooks import ForwardPass
from tensorguard.backends.vllm.install import (
    FUSED_LAYERS,
    AttachedGroup,
    AttachedProjection,
    Attachment,
    Hooks,
    install_hooks,
)
from tensorguard.backends.vllm.parallel import Ranks, SharedAttachments, SharedDeltas, share
from tensorguard.backends.vllm.shards import shards_of
from tensorguard.errors import DeltaUnavailableError, InternalError, InvalidInputError, NotFoundError, TenSafeError
from tests.support.layer_shards import as_rank, input_of, make_layer, one_rank, outputs_of

D_IN, ROWS, TOKENS = 12, 5, 4
SIZE = 3


@pytest.fixture(params=[2, SIZE])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[Ranks], Any]], list[Any]]]:
    """Calls a function on every rank at once; the results, where it raised the errors, by rank."""
    size, store = request.param, HashStore()

    def ranks_of(rank: int) -> Ranks:
        group = ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
        return Ranks(group, rank, size)

    with ThreadPoolExecutor(size) as pool:
        ranks = list(pool.map(ranks_of, range(size)))

        def attempt(function: Callable[[Ranks], Any], mine: Ranks) -> Any:
            try:
                return function(mine)
            except Exception as error:
                return error

        yield lambda function: list(pool.map(lambda mine: attempt(function, mine), ranks))


class Source:
    """z = A x on rank 0; fails where told to."""

    def __init__(self, d_in: int = D_IN) -> None:
        self.a = np.random.default_rng(0).standard_normal((ROWS, d_in))
        self.fail_begin: Exception | None = None
        self.fail_wait: Exception | None = None
        self.inputs: list[npt.NDArray[Any]] = []

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> Source:
        if self.fail_begin:
            raise self.fail_begin
        self.inputs.append(x)
        return self

    def wait(self, timeout: float) -> npt.NDArray[np.float64]:
        if self.fail_wait:
            raise self.fail_wait
        return np.asarray(self.inputs[-1] @ self.a.T, np.float64)


def deltas(ranks: Ranks, source: Source) -> SharedDeltas:
    return SharedDeltas(ranks, {(0, "qkv"): (D_IN, ROWS), (0, "o"): (D_IN, ROWS)}, source if ranks.leads else None)


X = np.random.default_rng(1).standard_normal((TOKENS, D_IN)).astype(np.float32)


def test_all_ranks_get_the_delta_of_an_input_that_each_has(run: Any) -> None:
    source = Source()
    found = run(lambda ranks: deltas(ranks, source).begin(0, "qkv", X).wait(1.0))
    for z in found:
        np.testing.assert_allclose(z, X @ source.a.T, rtol=1e-5)
        assert z.tobytes() == found[0].tobytes()


def test_an_input_that_is_spread_is_put_together_on_rank_0(run: Any) -> None:
    source = Source()

    def compute(ranks: Ranks) -> Any:
        width = D_IN // ranks.size
        # As the hooks cut it out of a larger batch: not contiguous.
        mine = X[:, ranks.rank * width : (ranks.rank + 1) * width]
        return deltas(ranks, source).begin(0, "o", mine).wait(1.0)

    for z in run(compute):
        np.testing.assert_allclose(z, X @ source.a.T, rtol=1e-5)
    assert np.array_equal(source.inputs[-1], X)


@pytest.mark.parametrize("where", ["fail_begin", "fail_wait"])
def test_a_missing_delta_is_missing_on_every_rank_in_the_same_call(run: Any, where: str) -> None:
    source = Source()

    def compute(ranks: Ranks) -> list[bool]:
        mine, outcomes = deltas(ranks, source), []
        for call in range(4):
            if ranks.leads:
                setattr(source, where, DeltaUnavailableError("x") if call in (1, 2) else None)
            pending = mine.begin(0, "qkv", X)
            try:
                pending.wait(1.0)
                outcomes.append(True)
            except DeltaUnavailableError:
                outcomes.append(False)
        return outcomes

    assert run(compute) == [[True, False, False, True]] * len(run(lambda ranks: None))


def test_a_defect_on_rank_0_does_not_leave_the_others_waiting(run: Any) -> None:
    source = Source()
    source.fail_wait = ValueError("a defect")
    first, *others = run(lambda ranks: deltas(ranks, source).begin(0, "qkv", X).wait(1.0))
    assert isinstance(first, ValueError)
    assert all(isinstance(error, DeltaUnavailableError) for error in others)


def test_what_rank_0_does_is_everyones_result_or_error(run: Any) -> None:
    def work(answer: Any) -> Callable[[Ranks], Any]:
        def leading() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        def failing() -> Any:
            raise AssertionError("only rank 0 works")

        return lambda ranks: ranks.lead(leading if ranks.leads else failing)

    big = np.arange(100_000, dtype=np.float32)
    assert all(np.array_equal(found["basis"], big) for found in run(work({"basis": big})))
    for error in run(work(NotFoundError("there is no adapter x"))):
        assert isinstance(error, NotFoundError)
        assert error.message == "there is no adapter x"
    first, *others = run(work(ValueError("a secret 1234")))
    assert isinstance(first, ValueError)
    assert all(isinstance(error, TenSafeError) and "1234" not in error.message for error in others)


@pytest.mark.parametrize("liar", [None, 0, 1])
def test_all_means_every_rank(run: Any, liar: int | None) -> None:
    assert set(run(lambda ranks: ranks.all(ranks.rank != liar))) == {liar is None}


class Projections:
    """A full-width adapter of one group: z = A x, and U for each projection."""

    def __init__(self, outputs: dict[str, int], d_in: int) -> None:
        rng = np.random.default_rng(3)
        projections, offset = [], 0
        for rank, (name, d_out) in enumerate(outputs.items(), start=2):
            basis = rng.standard_normal((d_out, rank)).astype(np.float32)
            projections.append(AttachedProjection(name, offset, rank, basis))
            offset += rank
        self.projections = tuple(projections)
        self.a = rng.standard_normal((offset, d_in))

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> Projections:
        self.z = x.astype(np.float64) @ self.a.T
        return self

    def wait(self, timeout: float) -> npt.NDArray[np.float64]:
        return self.z

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        z = x.double().numpy() @ self.a.T
        return torch.from_numpy(
            np.concatenate([z[:, p.row_offset : p.row_offset + p.rank] @ p.basis.T for p in self.projections], axis=1)
        ).float()


@pytest.mark.parametrize(("group", "kv_heads"), [("qkv", 6), ("qkv", 1), ("gate_up", 0), ("o", 0), ("down", 0)])
def test_ranks_together_compute_what_one_rank_computes(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, kv_heads: int
) -> None:
    torch.manual_seed(0)
    size, outputs, d_in = len(run(lambda ranks: None)), outputs_of(group, kv_heads), input_of(group)
    weights = {name: torch.randn(d_out, d_in) for name, d_out in outputs.items()}
    adapter, layers = Projections(outputs, d_in), []
    with one_rank(tmp_path / "store"):
        for rank in range(size):
            as_rank(monkeypatch, rank, size)
            layers.append(make_layer(group, kv_heads, weights))
            layers[-1].quant_method.process_weights_after_loading(layers[-1])
    x = torch.randn(6, d_in)
    # Requests of one, three and two rows; the second has no adapter.
    expected = x @ torch.cat(list(weights.values())).T
    expected[[0, 4, 5]] += adapter.delta(x[[0, 4, 5]])

    def compute(ranks: Ranks) -> torch.Tensor:
        root, layer, width = torch.nn.Module(), layers[ranks.rank], d_in // ranks.size
        root.layers = torch.nn.ModuleList([torch.nn.Module()])
        root.layers[0].mlp = torch.nn.Module()
        fused = next(name for name, known in FUSED_LAYERS.items() if known == group)
        setattr(root.layers[0].mlp, fused, layer)
        hooks = install_hooks(root, ForwardPass({}, torch.device("cpu"), 5.0))
        attachment = Attachment("a", (AttachedGroup(0, group, d_in, adapter.projections),), adapter)
        given = share(ranks, attachment)
        assert isinstance(given.source, SharedDeltas)
        hooks.add(hooks.fit(given if ranks.leads else replace(given, source=replace(given.source, source=None))))
        hooks.forward_pass.start(["r", "s", "t"], ["a", None, "a"], np.array([0, 1, 4, 6]))
        mine = x[:, ranks.rank * width : (ranks.rank + 1) * width] if group in ("o", "down") else x
        return layer.quant_method.compute(layer, mine, None)

    with torch.inference_mode():
        parts = run(compute)
    assert not [part for part in parts if isinstance(part, Exception)], parts
    if group in ("o", "down"):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-4)
        return
    starts = dict(zip(outputs, np.cumsum([0, *outputs.values()]), strict=False))
    for layer, part in zip(layers, parts, strict=True):
        for name, shard in shards_of(layer, group).items():
            whole = expected[:, starts[name] : starts[name] + outputs[name]]
            torch.testing.assert_close(part[:, shard.columns], whole[:, shard.part], rtol=1e-4, atol=1e-4)


# Attaching -----------------------------------------------------------------------------------------------------------


@dataclass
class Connected:
    name: str
    digest: str
    attachment: Attachment
    sequence: int = 1
    closed: bool = False

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


class Connector:
    evidence_kind = "none"

    def __init__(self) -> None:
        self.go, self.error = threading.Event(), None
        self.source = Source()

    def connect(self, connection: AdapterConnection) -> Connected:
        assert self.go.wait(10)
        if self.error:
            raise self.error
        basis = np.ones((D_IN, ROWS), np.float32)
        groups = (AttachedGroup(0, "o", D_IN, (AttachedProjection("o_proj", 0, ROWS, basis),)),)
        return Connected(connection.name, "d" * 64, Attachment(f"{connection.name}@d", groups, self.source))


class Fits(Hooks):
    """Hooks of a model without layers, which every adapter fits."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__({}, {}, {}, ForwardPass({}, torch.device("cpu"), 1.0))
        object.__setattr__(self, "broken", broken)

    def fit(self, attachment: Attachment) -> Any:
        if self.broken:  # type: ignore[attr-defined]
            raise MemoryError
        return attachment

    def add(self, adapter: Any) -> None:
        self.forward_pass.sources[adapter.key] = adapter.source


CONNECTION = AdapterConnection(
    name="red",
    coprocessor_endpoint="c",
    attestor_endpoint="a",
    publisher_keys=("key",),  # type: ignore[arg-type]
)


def attach(ranks: Ranks, connector: Connector, hooks: Fits) -> tuple[SharedAttachments, Any]:
    leading = Attachments(connector, hooks, lambda given: share(ranks, given)) if ranks.leads else None
    attachments = SharedAttachments(ranks, hooks, leading)
    ticket = attachments.begin(CONNECTION)
    assert attachments.outcome(ticket) is None, "not finished anywhere before rank 0 is"
    connector.go.set()
    for _ in range(200):
        if found := attachments.outcome(ticket):
            return attachments, found
        time.sleep(0.01)
    raise AssertionError("not attached")


def test_an_adapter_is_attached_to_all_ranks_in_the_same_call_and_detached(run: Any) -> None:
    connector = Connector()

    def scenario(ranks: Ranks) -> Any:
        hooks = Fits()
        attachments, found = attach(ranks, connector, hooks)
        source = hooks.forward_pass.sources["red@d"]
        assert isinstance(source, SharedDeltas)
        assert (source.source is connector.source) == ranks.leads, "only rank 0 has a session"
        z = source.begin(0, "o", X).wait(1.0)
        attachments.detach("red@d")
        return found, z, dict(hooks.forward_pass.sources)

    for found, z, left in run(scenario):
        assert (found["key"], found["name"], left) == ("red@d", "red", {})
        np.testing.assert_allclose(z, X @ connector.source.a.T, rtol=1e-5)


def test_a_refusal_of_rank_0_is_everyones(run: Any) -> None:
    connector = Connector()
    connector.error = InvalidInputError("no")
    for error in run(lambda ranks: attach(ranks, connector, Fits())):
        assert isinstance(error, InvalidInputError)


def test_an_adapter_that_one_rank_cannot_take_is_attached_to_none(run: Any) -> None:
    connector = Connector()
    all_hooks: dict[int, Fits] = {}

    def scenario(ranks: Ranks) -> Any:
        hooks = all_hooks[ranks.rank] = Fits(broken=ranks.rank == 1)
        return attach(ranks, connector, hooks)

    assert all(isinstance(error, InternalError) for error in run(scenario))
    assert all(not hooks.forward_pass.sources for hooks in all_hooks.values())


def test_gloo_groups_of_vllm_have_the_interface_that_is_used() -> None:
    assert {"broadcast", "gather", "allreduce"} <= set(dir(ProcessGroup))
