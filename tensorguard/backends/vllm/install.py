"""Put the hooks onto the linear layers of a loaded model, and adapters into the hooks.

Every fused layer of the language model is hooked when the model is loaded, before anything is compiled or
captured. Which adapters a hook computes is a mapping that changes between two steps, so attaching and detaching
touch neither the model nor its graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from vllm.model_executor.layers.linear import LinearBase

from tensorguard.backends.vllm.hooks import DeltaSource, ForwardPass, HookedLinearMethod, ProjectionBasis
from tensorguard.backends.vllm.shards import misfit, shards_of
from tensorguard.errors import BaseModelMismatchError, UnsupportedAdapterError

# vLLM's fused layers, and the group of projections (`shards.GROUPS`) that share the layer's input.
FUSED_LAYERS: Mapping[str, str] = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
# Decoder layers of the language model. Vision towers, encoders, draft models and experts have other paths.
_LAYER_NAME = re.compile(
    rf"^(?:(?:model|language_model)\.)*layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(FUSED_LAYERS)})$"
)

Site = tuple[int, str]
"""(layer number, group), such as (0, "qkv")."""


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

    key: str
    """What requests name it by: the adapter's name and release (`rows.adapter_key`)."""
    groups: tuple[AttachedGroup, ...]
    source: DeltaSource


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter whose groups were found to fit the served model."""

    key: str
    bases: Mapping[Site, tuple[ProjectionBasis, ...]]
    source: DeltaSource


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of one model. `fit` may run in any thread; `add` and `remove` only between two steps."""

    layers: Mapping[Site, LinearBase]
    methods: Mapping[Site, HookedLinearMethod]
    misfits: Mapping[Site, str]
    """Layers that could not be hooked, and why."""
    forward_pass: ForwardPass = field(repr=False)

    def fit(self, attachment: Attachment) -> FittedAdapter:
        """Check an adapter against the model and bring its bases to the layers' devices; changes nothing.

        Raises UnsupportedAdapterError where the adapter has a group that the model has no layer for, and
        BaseModelMismatchError where the shapes differ.
        """
        bases = {}
        for group in attachment.groups:
            site = (group.layer, group.group)
            if site in self.misfits:
                raise UnsupportedAdapterError(
                    f"adapter {attachment.key!r} has group {group.group!r} in layer {group.layer}, whose layer in the "
                    f"served model {self.misfits[site]}; serve a model with dense, separately packed projections"
                )
            if site not in self.layers:
                raise UnsupportedAdapterError(
                    f"adapter {attachment.key!r} has group {group.group!r} in layer {group.layer}, which the served "
                    "model has no dense layer for (layers of experts, vision and embedding layers cannot be adapted); "
                    "pack the adapter for this base model"
                )
            bases[site] = _bases(self.layers[site], group, attachment.key)
        return FittedAdapter(attachment.key, bases, attachment.source)

    def add(self, adapter: FittedAdapter) -> None:
        """Compute `adapter` for the requests that name it, from the next step on."""
        for site, bases in adapter.bases.items():
            self.methods[site].bases[adapter.key] = bases
        self.forward_pass.sources[adapter.key] = adapter.source

    def remove(self, key: str) -> None:
        """Forget an adapter. Requests that still name it fail."""
        self.forward_pass.sources.pop(key, None)
        for method in self.methods.values():
            method.bases.pop(key, None)


def install_hooks(model: torch.nn.Module, forward_pass: ForwardPass) -> Hooks:
    """Hook every fused linear layer of the model's decoder that is fused as expected."""
    layers, methods, misfits = {}, {}, {}
    for site, layer in _fused_layers(model):
        if reason := misfit(layer, site[1]):
            misfits[site] = reason
            continue
        method = HookedLinearMethod(layer.quant_method, *site, {}, forward_pass)
        layer.quant_method = methods[site] = method
        layers[site] = layer
        # The remote product takes activations as they are: no kernel before this layer may quantise them for it.
        layer.requires_unquantized_input = True
    return Hooks(layers, methods, misfits, forward_pass)


def _fused_layers(model: torch.nn.Module) -> Iterator[tuple[Site, LinearBase]]:
    for name, module in model.named_modules():
        match = _LAYER_NAME.search(name)
        if match and isinstance(module, LinearBase):
            yield (int(match[1]), FUSED_LAYERS[match[2]]), module


def _bases(layer: LinearBase, group: AttachedGroup, adapter: str) -> tuple[ProjectionBasis, ...]:
    where = f"adapter {adapter!r}, layer {group.layer}, group {group.group!r}"
    if group.d_in != layer.input_size:
        raise BaseModelMismatchError(f"{where}: d_in is {group.d_in}, the served model has {layer.input_size}")
    device = next(layer.parameters()).device if any(True for _ in layer.parameters()) else torch.device("cpu")
    shards = shards_of(layer, group.group)
    bases = []
    for projection in group.projections:
        if projection.name not in shards:
            raise UnsupportedAdapterError(f"{where}: projection {projection.name!r} is not part of this group")
        shard = shards[projection.name]
        found = (projection.rank, projection.rank) if projection.basis is None else projection.basis.shape
        if found != (shard.d_out, projection.rank):
            raise BaseModelMismatchError(
                f"{where}, {projection.name}: the adapter's outputs have shape {found}, the model needs "
                f"({shard.d_out}, {projection.rank})"
            )
        first, last = projection.row_offset, projection.row_offset + projection.rank
        if projection.basis is None:
            inputs, basis = slice(first + shard.part.start, first + shard.part.stop), None
        else:
            part = np.ascontiguousarray(projection.basis[shard.part].T, dtype=np.float32)
            inputs, basis = slice(first, last), torch.from_numpy(part).to(device)
        bases.append(ProjectionBasis(inputs, shard.columns, basis))
    return tuple(bases)
