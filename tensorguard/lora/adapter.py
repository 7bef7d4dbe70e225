"""A LoRA adapter as PEFT saves it: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorguard.errors import MissingWeightsError, UnsupportedAdapterError
from tensorguard.lora.config import AdapterConfig, matches, read_config
from tensorguard.lora.tensors import read_float_tensors

MAX_LAYERS = 1024

_PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d{1,4})\.(?P<parent>self_attn|mlp)\."
    r"(?P<projection>[a-z_]+))\.lora_(?P<half>[AB])\.weight\Z"
)

_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"

Float32Array = np.ndarray[Any, np.dtype[np.float32]]
ModuleKey = tuple[int, str]
"""(layer number, projection name), such as (0, "q_proj")."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """One adapted projection: x -> scaling * B @ (A @ x)."""

    A: Float32Array
    """float32 [rank, d_in]"""
    B: Float32Array
    """float32 [d_out, rank]"""
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])

    @property
    def d_in(self) -> int:
        """Input channels."""
        return int(self.A.shape[1])

    @property
    def d_out(self) -> int:
        """Output channels."""
        return int(self.B.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """All modules of an adapter. `rank`, `alpha` and `scaling` are defaults; a module may have its own."""

    rank: int
    alpha: float
    scaling: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    base_model_name: str
    layers: frozenset[int] | None
    """Layers the configuration names, None when it means all layers of the base model."""
    modules: Mapping[ModuleKey, LoraModule]

    @classmethod
    def load(cls, folder: Path | str) -> LoraAdapter:
        """Read and check an adapter folder.

        Raises UnsupportedAdapterError naming what the zero-rotation contract does not allow (other PEFT
        types, DoRA, biases, extra modules, unknown projections, ranks above 128, shapes that do not fit,
        NaN) and MissingWeightsError for files or halves that are not there.
        """
        folder = Path(folder)
        config = read_config(folder / "adapter_config.json")
        modules = _pair(read_float_tensors(folder / "adapter_model.safetensors"), config)
        _check_complete(modules, config)
        return cls(
            rank=config.rank,
            alpha=config.alpha,
            scaling=config.scaling_of(""),
            use_rslora=config.use_rslora,
            target_modules=config.target_modules,
            base_model_name=config.base_model_name,
            layers=config.layers,
            modules=modules,
        )

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Check layers and shapes against the base model's `config.json`.

        Raises MissingWeightsError when a layer of the model that the adapter means has no weights, and
        UnsupportedAdapterError when a shape or layer number does not fit the model.
        """
        count = _positive(config, "num_hidden_layers")
        shapes = projection_shapes(config)
        for (layer, projection), module in sorted(self.modules.items()):
            if layer >= count:
                raise UnsupportedAdapterError(f"the adapter has layer {layer}; the base model has {count} layers")
            if (module.d_out, module.d_in) != shapes[projection]:
                raise UnsupportedAdapterError(
                    f"layer {layer} {projection} maps {module.d_in} to {module.d_out} channels, but in the "
                    f"base model {shapes[projection][1]} to {shapes[projection][0]}: it is for another model"
                )
        if self.layers is None and not any("." in name for name in self.target_modules):
            present = {layer for layer, _ in self.modules}
            missing = sorted(set(range(count)) - present)
            if missing:
                raise MissingWeightsError(
                    f"the adapter has no weights for layer {missing[0]} of the base model: name its layers in "
                    f"layers_to_transform, or {_SAVE_AGAIN}"
                )


def _pair(tensors: Mapping[str, Float32Array], config: AdapterConfig) -> dict[ModuleKey, LoraModule]:
    halves: dict[ModuleKey, dict[str, Float32Array]] = {}
    paths: dict[ModuleKey, str] = {}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if not match or _PARENTS.get(match["projection"]) != match["parent"] or int(match["layer"]) >= MAX_LAYERS:
            raise UnsupportedAdapterError(
                f"the adapter holds {name:.200}; only the projections {', '.join(_PARENTS)} of decoder "
                "layers can be adapted"
            )
        if not any(matches(target, match["module"]) for target in config.target_modules):
            raise UnsupportedAdapterError(f"the adapter holds {name}, which target_modules does not name")
        key = (int(match["layer"]), match["projection"])
        halves.setdefault(key, {})[match["half"]] = tensor
        paths[key] = match["module"]
    return {key: _module(paths[key], halves[key], config) for key in sorted(halves)}


def _module(path: str, halves: Mapping[str, Float32Array], config: AdapterConfig) -> LoraModule:
    for half in ("A", "B"):
        if half not in halves:
            raise MissingWeightsError(f"{path} has no lora_{half}.weight: {_SAVE_AGAIN}")
    a, b = halves["A"], halves["B"]
    rank = config.rank_of(path)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank or 0 in a.shape + b.shape:
        raise UnsupportedAdapterError(
            f"{path} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected [{rank}, d_in] and [d_out, {rank}]"
        )
    return LoraModule(A=a, B=b, scaling=config.scaling_of(path))


def _check_complete(modules: Mapping[ModuleKey, LoraModule], config: AdapterConfig) -> None:
    paths = {key: f"model.layers.{key[0]}.{_PARENTS[key[1]]}.{key[1]}" for key in modules}
    layers = config.layers if config.layers is not None else frozenset(layer for layer, _ in modules)
    if extra := {layer for layer, _ in modules} - layers:
        raise UnsupportedAdapterError(f"the adapter holds layer {min(extra)}, which layers_to_transform does not name")
    for target in config.target_modules:
        found = {key[0] for key, path in paths.items() if matches(target, path)}
        projection = target.rpartition(".")[2]
        if projection not in _PARENTS:
            raise UnsupportedAdapterError(f"target module {target!r:.100} cannot be adapted; use {', '.join(_PARENTS)}")
        if not found:
            raise MissingWeightsError(
                f"target module {target} has no weights in adapter_model.safetensors: {_SAVE_AGAIN}"
            )
        # A name without a layer number means that projection in every adapted layer.
        if not re.search(r"\d", target) and found != layers:
            raise MissingWeightsError(
                f"target module {target} has no weights in layer {min(layers - found)}: {_SAVE_AGAIN}"
            )


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every projection, from a base model's `config.json`. Raises UnsupportedAdapterError."""
    hidden = _positive(config, "hidden_size")
    inner = _positive(config, "intermediate_size")
    heads = _positive(config, "num_attention_heads")
    key_heads = heads if config.get("num_key_value_heads") is None else _positive(config, "num_key_value_heads")
    head = hidden // heads if config.get("head_dim") is None else _positive(config, "head_dim")
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (key_heads * head, hidden),
        "v_proj": (key_heads * head, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedAdapterError(f"the base model's config.json has no usable {name}: {value!r:.40}")
    return value
