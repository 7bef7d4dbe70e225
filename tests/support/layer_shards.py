"""vLLM's own linear layers, as one of several tensor-parallel ranks has them, in one process without the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

HIDDEN, HEAD, HEADS, INNER = 24, 4, 12, 36


@contextmanager
def one_rank(store: Path) -> Iterator[None]:
    """What vLLM's layers need of a process."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Have layers that are made from now on be those of a rank."""
    for module in (linear, parallel_state):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: size)


def outputs_of(group: str, kv_heads: int) -> dict[str, int]:
    """The projections of a group, and their outputs on all ranks together."""
    return {
        "qkv": {"q_proj": HEADS * HEAD, "k_proj": kv_heads * HEAD, "v_proj": kv_heads * HEAD},
        "o": {"o_proj": HIDDEN},
        "gate_up": {"gate_proj": INNER, "up_proj": INNER},
        "down": {"down_proj": HIDDEN},
    }[group]


def input_of(group: str) -> int:
    """Width of a group's input on all ranks together."""
    return {"qkv": HIDDEN, "o": HEADS * HEAD, "gate_up": HIDDEN, "down": INNER}[group]


def make_layer(group: str, kv_heads: int, weights: dict[str, torch.Tensor]) -> LinearBase:
    """The present rank's layer, which loads its part of the projections' weights [d_out, d_in]."""
    layer: LinearBase
    shard_ids: tuple[str | int | None, ...]
    if group == "qkv":
        layer = QKVParallelLinear(HIDDEN, HEAD, HEADS, kv_heads, bias=False, prefix="qkv")
        shard_ids = ("q", "k", "v")
    elif group == "gate_up":
        layer, shard_ids = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False, prefix="gate_up"), (0, 1)
    else:
        layer, shard_ids = RowParallelLinear(input_of(group), HIDDEN, bias=False, prefix=group), (None,)
    for shard_id, whole in zip(shard_ids, weights.values(), strict=True):
        given = (whole.to(layer.weight.dtype),) if shard_id is None else (whole.to(layer.weight.dtype), shard_id)
        layer.weight.weight_loader(layer.weight, *given)
    return layer
