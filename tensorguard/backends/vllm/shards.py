"""Which part of a projection's outputs a tensor-parallel rank adds, and where they are in its layer's output.

A column-parallel layer (qkv, gate_up) computes some outputs of every projection on each rank; where there are more
ranks than key/value heads, several ranks compute the same ones. A row-parallel layer (o, down) computes all outputs of
a part of the inputs, and the ranks' results are summed afterwards: there each rank adds its own part of the outputs,
so that the sum has every delta once and the ranks share the work. With one rank a part is the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

GROUPS: Mapping[str, tuple[type[LinearBase], tuple[str, ...]]] = {
    "qkv": (QKVParallelLinear, ("q_proj", "k_proj", "v_proj")),
    "o": (RowParallelLinear, ("o_proj",)),
    "gate_up": (MergedColumnParallelLinear, ("gate_proj", "up_proj")),
    "down": (RowParallelLinear, ("down_proj",)),
}
"""Per group: the class of vLLM's layer, and its projections in the order of the output."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one projection."""

    d_out: int
    """Outputs of the whole projection."""
    part: slice
    """Those of them that this rank adds."""
    columns: slice
    """Where these are in the output of the rank's layer."""


def misfit(layer: LinearBase, group: str) -> str | None:
    """Why a layer cannot be the fused layer of `group`; None if it can."""
    expected, names = GROUPS[group]
    if not isinstance(layer, expected):
        return f"is a {type(layer).__name__}, not a {expected.__name__}"
    if len(layer.output_partition_sizes) != len(names):
        return f"has {len(layer.output_partition_sizes)} parts instead of {', '.join(names)}"
    return None


def shards_of(layer: LinearBase, group: str) -> dict[str, Shard]:
    """Per projection of the group, the part of it that belongs to this rank's layer, which must fit."""
    names = GROUPS[group][1]
    ranks, rank, widths = layer.tp_size, layer.tp_rank, layer.output_partition_sizes
    if isinstance(layer, RowParallelLinear):
        (width,) = widths
        part = slice(rank * width // ranks, (rank + 1) * width // ranks)
        return {names[0]: Shard(width, part, part)}
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) else 1
    shards = {}
    for name, width, end in zip(names, widths, accumulate(widths), strict=True):
        copies = replicas if name in ("k_proj", "v_proj") else 1
        start = rank // copies * width
        shards[name] = Shard(width * ranks // copies, slice(start, start + width), slice(end - width, end))
    return shards
