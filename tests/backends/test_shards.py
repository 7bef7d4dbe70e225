"""A rank's part of a projection is what vLLM's own layers load as that rank's part of the weights."""

from __future__ import annotations

from collections.abc import Iterator

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

from tensorguard.backends.vllm.shards import GROUPS, shards_of

HIDDEN, HEAD, INNER = 24, 4, 36


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("store") / "file"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    for module in (linear, parallel_state):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: size)


def column_layer(group: str, kv_heads: int) -> tuple[LinearBase, dict[str, int]]:
    """A layer that holds in each weight row the number of the output it computes, and the projections' outputs."""
    if group == "qkv":
        heads = 12
        layer: LinearBase = QKVParallelLinear(HIDDEN, HEAD, heads, kv_heads, bias=False, prefix="qkv")
        outputs = {"q_proj": heads * HEAD, "k_proj": kv_heads * HEAD, "v_proj": kv_heads * HEAD}
        shard_ids: tuple[str | int, ...] = ("q", "k", "v")
    else:
        layer = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False, prefix="gate_up")
        outputs, shard_ids = {"gate_proj": INNER, "up_proj": INNER}, (0, 1)
    for shard_id, d_out in zip(shard_ids, outputs.values(), strict=True):
        whole = torch.arange(d_out, dtype=layer.weight.dtype)[:, None].expand(d_out, HIDDEN).contiguous()
        layer.weight.weight_loader(layer.weight, whole, shard_id)
    return layer, outputs


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize(("group", "kv_heads"), [("qkv", 12), ("qkv", 6), ("qkv", 3), ("qkv", 1), ("gate_up", 0)])
def test_a_column_parallel_rank_adds_the_outputs_it_computes(
    monkeypatch: pytest.MonkeyPatch, group: str, kv_heads: int, ranks: int
) -> None:
    if kv_heads and max(kv_heads, ranks) % min(kv_heads, ranks):
        pytest.skip("vLLM cannot divide these heads")
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        layer, outputs = column_layer(group, kv_heads)
        shards = shards_of(layer, group)
        assert {name: shard.d_out for name, shard in shards.items()} == outputs
        covered = 0
        for shard in shards.values():
            assert layer.weight[shard.columns, 0].tolist() == list(range(shard.part.start, shard.part.stop))
            covered += shard.columns.stop - shard.columns.start
        assert covered == len(layer.weight)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_row_parallel_ranks_add_every_output_once(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    d_in, d_out = 60, 28
    added = torch.zeros(d_out)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        layer = RowParallelLinear(d_in, d_out, bias=False, prefix="o")
        (shard,) = shards_of(layer, "o").values()
        assert (shard.d_out, shard.part) == (d_out, shard.columns)
        added[shard.columns] += 1
    assert added.tolist() == [1] * d_out


def test_the_groups_are_those_of_the_packages() -> None:
    assert {group: names for group, (_, names) in GROUPS.items()} == {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
