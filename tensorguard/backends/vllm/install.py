"""Put the hooks onto the linear layers of a loaded model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.model_executor.layers.linear import LinearBase

from tensorguard.backends.vllm.hooks import DeltaSource, ForwardPass, HookedLinearMethod, ProjectionBasis
from tensorguard.errors import BaseModelMismatchError, UnsupportedAdapterError

# vLLM's fused layers: the group that shares the layer's input, and its projections in the order of the
# output.
FUSED_LAYERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "qkv_proj": ("qkv", ("q_proj", "k_proj", "v_proj")),
    "o_proj": ("o", ("o_proj",)),
    "gate_up_proj": ("gate_up", ("gate_proj", "up_proj")),
    "down_proj": ("down", ("down_proj",)),
}
_LAYER_NAME = re.compile(rf"(?:^|\.)layers\.(\d+)\.[a-z_]+\.({'|'.join(FUSED_LAYERS)})$")


@dataclass(frozen=True, slots=True)
class AttachedProjection:
    """One adapted projection: which columns of its group's z are its own, and its basis U."""

    name: str
    row_offset: int
    rank: int
    basis: npt.NDArray[np.float32] | None
    """U, [d_out, rank]; None in full mode, where the rank is d_out."""


@dataclass(frozen=True, slots=True)
class AttachedGroup:
    """The adapted projections of one layer that share an input of width d_in."""

    layer: int
    group: str
    d_in: int
    projections: tuple[AttachedProjection, ...]


@dataclass(frozen=True, slots=True)
class Attachment:
    """An adapter that is ready to be computed."""

    name: str
    groups: tuple[AttachedGroup, ...]
    source: DeltaSource


def install_hooks(model: torch.nn.Module, attachments: Sequence[Attachment], forward_pass: ForwardPass) -> int:
    """Hook exactly the layers that an adapter has a group for; returns their number.

    Raises UnsupportedAdapterError where an adapter has a group that the model has no layer for, and
    BaseModelMismatchError where the shapes differ.
    """
    layers = dict(_fused_layers(model))
    hooks: dict[tuple[int, str], dict[str, tuple[ProjectionBasis, ...]]] = {}
    for attachment in attachments:
        for group in attachment.groups:
            site = (group.layer, group.group)
            if site not in layers:
                raise UnsupportedAdapterError(
                    f"adapter {attachment.name!r} has group {group.group!r} in layer {group.layer}, "
                    f"which the served model does not have; pack the adapter for this base model"
                )
            hooks.setdefault(site, {})[attachment.name] = _bases(layers[site], group, attachment.name)
    for (number, name), bases in hooks.items():
        layer = layers[number, name]
        layer.quant_method = HookedLinearMethod(layer.quant_method, number, name, bases, forward_pass)
    return len(hooks)


def _fused_layers(model: torch.nn.Module) -> Iterator[tuple[tuple[int, str], LinearBase]]:
    for name, module in model.named_modules():
        match = _LAYER_NAME.search(name)
        if match and isinstance(module, LinearBase):
            yield (int(match[1]), FUSED_LAYERS[match[2]][0]), module


def _bases(layer: LinearBase, group: AttachedGroup, adapter: str) -> tuple[ProjectionBasis, ...]:
    where = f"adapter {adapter!r}, layer {group.layer}, group {group.group!r}"
    if group.d_in != layer.input_size:
        raise BaseModelMismatchError(f"{where}: d_in is {group.d_in}, the served model has {layer.input_size}")
    device = next(layer.parameters()).device if any(True for _ in layer.parameters()) else torch.device("cpu")
    names = next(names for fused, names in FUSED_LAYERS.values() if fused == group.group)
    ends = np.cumsum(layer.output_partition_sizes)
    columns = {
        n: slice(int(end) - int(size), int(end))
        for n, size, end in zip(names, layer.output_partition_sizes, ends, strict=True)
    }
    bases = []
    for projection in group.projections:
        if projection.name not in columns:
            raise UnsupportedAdapterError(f"{where}: projection {projection.name!r} is not part of this group")
        outputs = columns[projection.name]
        width = outputs.stop - outputs.start
        found = (projection.rank, projection.rank) if projection.basis is None else projection.basis.shape
        if found != (width, projection.rank):
            raise BaseModelMismatchError(
                f"{where}, {projection.name}: the adapter's outputs have shape {found}, the model needs "
                f"({width}, {projection.rank})"
            )
        basis = None
        if projection.basis is not None:
            basis = torch.from_numpy(np.ascontiguousarray(projection.basis.T, dtype=np.float32)).to(device)
        rows = slice(projection.row_offset, projection.row_offset + projection.rank)
        bases.append(ProjectionBasis(rows, outputs, basis))
    return tuple(bases)
