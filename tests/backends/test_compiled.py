"""The hooked layer as an operation: what a compiled model sees of it, and where vLLM cuts the graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import override_forward_context

from tensorguard.backends.vllm.compiled import OPERATION, register_layers, split_at_hooks
from tensorguard.backends.vllm.config import WorkerSettings
from tensorguard.errors import ConfigurationError, InternalError
from tests.backends.test_hooks import D_IN, D_OUT, Bench


class Model(torch.nn.Module):
    """Something before the hooked layer, and something after it that changes the output in place."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        bench.layer.output_partition_sizes = [4, 2, 4]
        bench.layer.quant_method = bench.hook
        self.layer = bench.layer
        self.bias: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer.quant_method.apply(self.layer, x * 2.0, self.bias)
        y += 1.0
        return torch.relu(y)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def model(bench: Bench) -> Iterator[Model]:
    made = Model(bench)
    layers: dict[str, Any] = {}
    register_layers(made, layers)
    assert list(layers) == ["hooked.3.qkv"]
    with override_forward_context(SimpleNamespace(no_compile_layers=layers)):  # type: ignore[arg-type]
        yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("bias", [None, torch.ones(D_OUT)])
def test_the_operation_keeps_the_rules_of_custom_operations(
    bench: Bench, model: Model, bias: torch.Tensor | None
) -> None:
    bench.start("a", "b", None)
    arguments = (torch.randn(3, D_IN), bias, torch.empty(3, D_OUT), bench.hook.name)
    torch.library.opcheck(torch.ops.tensafe.hooked_linear.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_computes_what_the_batch_asks_for(bench: Bench, model: Model, backend: str) -> None:
    """Traced once, without adapted rows, as vLLM does."""
    model.bias = torch.randn(D_OUT)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(4, D_IN))
    for owners in (("a", None, "b"), (None, None), ("b",) * 5, ("a", "b", "a", "b")):
        x = torch.randn(bench.start(*owners), D_IN)
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        bench.forward.finish()
        if any(owners):
            assert not torch.equal(expected, model(x)), "no row was adapted"
    assert counter.frame_count == 1


def test_vllm_cuts_the_graph_at_the_operation_and_keeps_the_order(bench: Bench, model: Model) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(model, fullgraph=True, backend=keep)(torch.randn(3, D_IN))
    (graph,) = graphs
    whole, pieces = split_graph(graph, [OPERATION])
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    (before, hooked, after) = ([str(node.target) for node in piece.graph.graph.nodes] for piece in pieces)
    assert any("hooked_linear" in target for target in hooked)
    assert not any("hooked_linear" in target for target in before + after)
    # The buffer is allocated by a graph: replayed, it keeps its address.
    assert any("empty" in target for target in before)
    assert not any("empty" in target for target in hooked)

    bench.start("a", "b", "a")
    x = torch.randn(3, D_IN)
    (result,) = whole(x)
    torch.testing.assert_close(result, model(x))


def test_a_hook_that_is_captured_raises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InternalError, match="CUDA graph"):
        bench.hook.apply(bench.layer, SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]


def config(**options: Any) -> CompilationConfig:
    defaults = {"mode": CompilationMode.VLLM_COMPILE, "cudagraph_mode": CUDAGraphMode.PIECEWISE, "splitting_ops": ["x"]}
    return CompilationConfig(**{**defaults, **options})


def test_vllm_is_told_once_to_cut_there() -> None:
    made = config()
    split_at_hooks(made)
    split_at_hooks(made)
    assert made.splitting_ops == ["x", OPERATION]
    uncompiled = config(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE, splitting_ops=None)
    split_at_hooks(uncompiled)
    assert uncompiled.splitting_ops is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cudagraph_mode": CUDAGraphMode.FULL}, "cudagraph_mode"),
        ({"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE}, "cudagraph_mode"),
        ({"splitting_ops": []}, "splitting_ops"),
        ({"use_inductor_graph_partition": True}, "use_inductor_graph_partition"),
    ],
)
def test_graphs_that_would_contain_a_hook_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        split_at_hooks(config(**options))


def test_hooks_change_the_key_of_compiled_graphs_and_paths_do_not(tmp_path: Path) -> None:
    def key(root: str | None) -> str:
        if root is None:
            return VllmConfig().compute_hash()
        settings = WorkerSettings(model_path=tmp_path, simulated_root_key=tmp_path / root)
        made = VllmConfig(additional_config=settings)
        assert made.additional_config is settings
        return made.compute_hash()

    assert key("a") == key("b")
    assert key("a") != key(None)
