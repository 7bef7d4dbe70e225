"""Tiny base models and PEFT adapters on disk, made with numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 48, 80, 4, 2, 2
SHAPES = {  # d_out, d_in
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN * KEY_HEADS // HEADS, HIDDEN),
    "v_proj": (HIDDEN * KEY_HEADS // HEADS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


def module_path(layer: int, projection: str) -> str:
    """The module's name in the base model."""
    parent = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{projection}"


def adapter_tensors(
    projections: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    rank: int = 4,
    layers: int = LAYERS,
    seed: int = 1,
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Random LoRA weights under PEFT's names."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for projection in projections:
            d_out, d_in = SHAPES[projection]
            prefix = f"base_model.model.{module_path(layer, projection)}.lora_"
            tensors[prefix + "A.weight"] = generator.normal(0, 0.1, (rank, d_in)).astype(np.float32)
            tensors[prefix + "B.weight"] = generator.normal(0, 0.05, (d_out, rank)).astype(np.float32)
    return tensors


def adapter_config(
    projections: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"), rank: int = 4, **changes: Any
) -> dict[str, Any]:
    """What PEFT 0.17 and later write, shortened."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": 2 * rank,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "target_modules": list(projections),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | changes


def write_adapter(
    folder: Path,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter folder as PEFT's save_pretrained writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config() if config is None else dict(config)))
    save_file(dict(adapter_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def write_base_model(folder: Path, **changes: Any) -> Path:
    """A Hugging Face model folder with everything that identifies a model (its weights are not complete)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": 16,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    weights = np.random.default_rng(3).normal(size=(16, HIDDEN)).astype(np.float32)
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors")
    return folder
