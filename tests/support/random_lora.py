"""A PEFT adapter folder with random weights, for tests that need an adapter but not a trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PARENTS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}


def write_random_lora(
    folder: Path,
    model_dir: Path,
    *,
    rank: int = 16,
    alpha: int = 32,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    layers: Sequence[int] | None = None,
    strength: float = 0.02,
    seed: int = 0,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors for a Llama-like model; returns `folder`."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {
        "q_proj": (hidden, head * config["num_attention_heads"]),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (head * config["num_attention_heads"], hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers if layers is not None else range(config["num_hidden_layers"]):
        for target in targets:
            d_in, d_out = shapes[target]
            prefix = f"base_model.model.model.layers.{layer}.{PARENTS.get(target, 'mlp')}.{target}"
            a = rng.standard_normal((rank, d_in)) / np.sqrt(d_in)
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = (strength * rng.standard_normal((d_out, rank))).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_dir),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
    if layers is not None:
        adapter["layers_to_transform"] = list(layers)
        adapter["layers_pattern"] = "layers"
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder
