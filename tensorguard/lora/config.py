"""Strict reading of PEFT's `adapter_config.json`.

Every key is read, known to change nothing at inference, or refused by name unless it is off. PEFT adds keys
with each release, always off by default, so an unknown key is accepted only when its value is null, false or
empty.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorguard.errors import MissingWeightsError, UnsupportedAdapterError

MAX_RANK = 128
MAX_CONFIG_BYTES = 1024 * 1024

_READ = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "init_lora_weights",
    "bias",
    "base_model_name_or_path",
}
# Training, bookkeeping, or parameters of features that another key switches on.
_HARMLESS = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Initialisations after which the adapter still belongs to the unchanged base weights. Others (pissa, olora,
# loftq, corda, lora_ga) subtract from the base, so that their adapter is wrong for the model that is served.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
# What PEFT treats as a regular expression; only names and dotted suffixes are matched here.
_PLAIN_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,200}\Z")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a PEFT LoRA configuration that decides what the adapter computes."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    layers: frozenset[int] | None
    """Layers that `layers_to_transform` names, None when it names none (then all are meant)."""
    base_model_name: str

    def rank_of(self, module: str) -> int:
        """The rank configured for a module path such as `model.layers.0.self_attn.q_proj`."""
        return next((rank for key, rank in self.rank_pattern if matches(key, module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (rsLoRA, arXiv:2312.03732)."""
        alpha = next((alpha for key, alpha in self.alpha_pattern if matches(key, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def matches(name: str, module: str) -> bool:
    """Whether a configured name means this module: it is the whole path, or its last dotted components."""
    if name.startswith("^"):
        return module == name[1:]
    return module == name or module.endswith("." + name)


def read_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises MissingWeightsError when there is none, UnsupportedAdapterError naming the field that is not
    supported.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise MissingWeightsError(
            f"cannot read {path} ({error.strerror}): a PEFT adapter folder holds adapter_config.json and "
            "adapter_model.safetensors"
        ) from None
    try:
        fields = json.loads(data) if len(data) <= MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UnsupportedAdapterError(f"{path} is not a JSON object of at most {MAX_CONFIG_BYTES} bytes")
    return _parse(fields)


def _parse(fields: dict[str, Any]) -> AdapterConfig:
    if fields.get("peft_type") != "LORA":
        raise _refusal("peft_type", fields.get("peft_type"), "only LORA adapters can be packed")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refusal("task_type", fields["task_type"], "only CAUSAL_LM adapters can be served")
    for name in fields.keys() - _READ - _HARMLESS:
        if fields[name] not in (None, False, "", [], {}):
            raise _refusal(name, fields[name], "train without this option")
    if fields.get("bias", "none") != "none":
        raise _refusal("bias", fields["bias"], "train with bias='none'")
    initialisation = fields.get("init_lora_weights")
    if initialisation not in _INITIALISATIONS:
        raise _refusal(
            "init_lora_weights",
            initialisation,
            "it may change the base weights; convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    rank = _rank(fields.get("r"), "r")
    return AdapterConfig(
        rank=rank,
        alpha=_alpha(fields.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(fields.get("use_rslora", False), "use_rslora"),
        target_modules=_target_modules(fields.get("target_modules")),
        rank_pattern=tuple((key, _rank(value, "rank_pattern")) for key, value in _pattern(fields, "rank_pattern")),
        alpha_pattern=tuple((key, _alpha(value, "alpha_pattern")) for key, value in _pattern(fields, "alpha_pattern")),
        layers=_layers(fields.get("layers_to_transform")),
        base_model_name=str(fields.get("base_model_name_or_path") or ""),
    )


def _refusal(name: str, value: object, advice: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"adapter_config.json: {name} = {value!r:.100} is not supported; {advice}")


def _rank(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _refusal(name, value, f"ranks go from 1 to {MAX_RANK}")
    return value


def _alpha(value: object, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1e9:
        raise _refusal(name, value, "it must be a positive number")
    return float(value)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _refusal(name, value, "it must be true or false")
    return value


def _target_modules(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise _refusal("target_modules", value, "give a list of module names (PEFT saves 'all-linear' as one)")
    return tuple(sorted(set(value)))


def _pattern(fields: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise _refusal(name, pattern, "it must be an object")
    for key in pattern:
        if not _PLAIN_PATTERN.match(key):
            raise _refusal(name, key, "use module names, not regular expressions")
    return list(pattern.items())


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        raise _refusal("layers_to_transform", value, "it must be a layer number or a list of them")
    return frozenset(layers)
