"""A complete, tiny Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 100000.0, "transformers_version": "5.0.0"}
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": []}}
TOKENIZER_CONFIG = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}", "is_local": True}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    weights = {"a": np.arange(64, dtype=np.float32), "b": np.ones((4, 4), dtype=np.float32)}
    save_file(weights, folder / "model.safetensors")
    return folder
