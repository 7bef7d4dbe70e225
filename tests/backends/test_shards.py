"""A rank's part of a projection is what vLLM's own layers load as that rank's part of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tensorguard.backends.vllm.shards import GROUPS, shards_of
from tests.support.layer_shards import HIDDEN, as_rank, input_of, make_layer, one_rank, outputs_of


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store") / "file"):
        yield


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize(("group", "kv_heads"), [("qkv", 12), ("qkv", 6), ("qkv", 1), ("gate_up", 0)])
def test_a_column_parallel_rank_adds_the_outputs_it_computes(
    monkeypatch: pytest.MonkeyPatch, group: str, kv_heads: int, ranks: int
) -> None:
    outputs = outputs_of(group, kv_heads)
    # Each weight row holds the number of the output it computes.
    weights = {n: torch.arange(d_out)[:, None].expand(d_out, HIDDEN).contiguous() for n, d_out in outputs.items()}
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        layer = make_layer(group, kv_heads, weights)
        shards = shards_of(layer, group)
        assert {name: shard.d_out for name, shard in shards.items()} == outputs
        covered = 0
        for shard in shards.values():
            assert layer.weight[shard.columns, 0].tolist() == list(range(shard.part.start, shard.part.stop))
            covered += shard.columns.stop - shard.columns.start
        assert covered == len(layer.weight)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_row_parallel_ranks_add_every_output_once(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    added = torch.zeros(HIDDEN)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        layer = make_layer("down", 0, {"down_proj": torch.zeros(HIDDEN, input_of("down"))})
        (shard,) = shards_of(layer, "down").values()
        assert (shard.d_out, shard.part) == (HIDDEN, shard.columns)
        added[shard.columns] += 1
    assert added.tolist() == [1] * HIDDEN


def test_the_groups_are_those_of_the_packages() -> None:
    assert {group: names for group, (_, names) in GROUPS.items()} == {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
