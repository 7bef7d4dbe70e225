"""What the base model's identity binds, what it leaves out on purpose, and what it refuses."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tensorguard.errors import ConfigurationError, InvalidInputError, TenSafeError
from tensorguard.models.identity import base_model_identity

from .conftest import CONFIG, TOKENIZER, TOKENIZER_CONFIG, write_json


def test_a_copy_has_the_same_identity_but_its_own_name(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    original, copied = base_model_identity(model_folder), base_model_identity(copy)
    assert original.differences(copied) == ()
    assert (original.name, copied.name) == ("tiny-model", "copy")
    assert len(original.config_sha256) == len(original.tokenizer_sha256) == 64


def test_a_snapshot_of_the_hub_cache_is_named_after_its_model(model_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(model_folder, snapshot)
    assert base_model_identity(snapshot).name == "owner/a--b"


def test_how_a_file_was_written_is_not_bound(model_folder: Path) -> None:
    before = base_model_identity(model_folder)
    relabelled = {**CONFIG, "transformers_version": "6.1", "_name_or_path": "/somewhere/else"}
    (model_folder / "config.json").write_text(
        json.dumps(dict(reversed(relabelled.items())), indent=4), encoding="utf-8"
    )
    write_json(model_folder / "tokenizer_config.json", {**TOKENIZER_CONFIG, "is_local": False})
    (model_folder / "README.md").write_text("words", encoding="utf-8")
    assert base_model_identity(model_folder).differences(before) == ()


def change_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["a"][40] += 1.0
    save_file(weights, folder / "model.safetensors")


def change_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["b"] = weights["b"].reshape(2, 8)
    save_file(weights, folder / "model.safetensors")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config value": ("config", lambda f: write_json(f / "config.json", {**CONFIG, "rope_theta": 10000.0})),
    "vocabulary": (
        "tokenizer",
        lambda f: write_json(f / "tokenizer.json", {**TOKENIZER, "model": {"vocab": {"a": 1, "é": 0}}}),
    ),
    "template in the configuration": (
        "tokenizer",
        lambda f: write_json(f / "tokenizer_config.json", {**TOKENIZER_CONFIG, "chat_template": "{{ 1 }}"}),
    ),
    "template in a file": ("tokenizer", lambda f: (f / "chat_template.jinja").write_text("{{ 2 }}")),
    "end token": (
        "tokenizer",
        lambda f: write_json(f / "tokenizer_config.json", {**TOKENIZER_CONFIG, "eos_token": "</s>"}),
    ),
    "weight value": ("weights", change_weight),
    "tensor shape": ("weights", change_shape),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_shows_in_its_own_hash(model_folder: Path, change: str) -> None:
    part, apply = CHANGES[change]
    before = base_model_identity(model_folder)
    apply(model_folder)
    assert base_model_identity(model_folder).differences(before) == (part,)


def test_a_fine_tune_of_the_same_shape_is_told_apart_in_a_large_file(model_folder: Path) -> None:
    """The file is larger than all samples together, so this is the sampled path."""
    generator = np.random.default_rng(1)
    weights = {"w": generator.standard_normal((2048, 1024), dtype=np.float32)}
    save_file(weights, model_folder / "model.safetensors")
    before = base_model_identity(model_folder)
    save_file({"w": weights["w"] * np.float32(1.001)}, model_folder / "model.safetensors")
    assert base_model_identity(model_folder).differences(before) == ("weights",)
    # The last tensor's end is sampled as well.
    weights["w"][-1, -1] += 1.0
    save_file(weights, model_folder / "model.safetensors")
    assert base_model_identity(model_folder).differences(before) == ("weights",)


def shard(folder: Path) -> dict[str, str]:
    """Split the folder's weights into two shards; return the weight map."""
    weights = load_file(folder / "model.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in weight_map.items():
        save_file({tensor: weights[tensor]}, folder / name)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return weight_map


def test_sharded_weights_are_bound_and_their_index_too(model_folder: Path) -> None:
    weight_map = shard(model_folder)
    before = base_model_identity(model_folder)
    index = model_folder / "model.safetensors.index.json"
    write_json(index, {"weight_map": {**weight_map, "c": weight_map["a"]}})
    assert base_model_identity(model_folder).differences(before) == ("weights",)
    write_json(index, {"weight_map": weight_map})
    assert base_model_identity(model_folder).differences(before) == ()
    save_file({"b": np.zeros((4, 4), dtype=np.float32)}, model_folder / weight_map["b"])
    assert base_model_identity(model_folder).differences(before) == ("weights",)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink()
    with pytest.raises(ConfigurationError, match=name.replace(".", r"\.")):
        base_model_identity(model_folder)


def test_a_missing_shard_is_named(model_folder: Path) -> None:
    weight_map = shard(model_folder)
    (model_folder / weight_map["b"]).unlink()
    with pytest.raises(ConfigurationError, match="model-00002-of-00002"):
        base_model_identity(model_folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a folder"):
        base_model_identity(tmp_path / "absent")


BROKEN: dict[str, tuple[str, bytes]] = {
    "config is not JSON": ("config.json", b"{"),
    "config is deeply nested": ("config.json", b"[" * 200_000),
    "config is a list": ("config.json", b"[]"),
    "config is not UTF-8": ("config.json", b'{"model_type": "\xff"}'),
    "config has no model type": ("config.json", b"{}"),
    "config is too large": ("config.json", b'{"model_type": "llama"}' + b" " * (4 << 20)),
    "weights are empty": ("model.safetensors", b""),
    "weights end in the header": ("model.safetensors", struct.pack("<Q", 100) + b"{}"),
    "header length is absurd": ("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "weights are a pickle": ("model.safetensors", struct.pack("<Q", 2) + b"\x80\x04"),
    "index has no map": ("model.safetensors.index.json", b"{}"),
    "index leads out of the folder": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "../model.safetensors"}}',
    ),
    "index names another kind of file": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "config.json"}}',
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_file_is_refused(model_folder: Path, case: str) -> None:
    name, content = BROKEN[case]
    (model_folder / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=name.replace(".", r"\.")):
        base_model_identity(model_folder)


def test_a_model_with_only_a_sentencepiece_tokenizer_has_an_identity(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    before = base_model_identity(model_folder)
    (model_folder / "tokenizer.model").write_bytes(b"\x01sentencepiece")
    assert base_model_identity(model_folder).differences(before) == ("tokenizer",)


def test_every_refusal_is_a_tensafe_error(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    (model_folder / "config.json").mkdir()
    with pytest.raises(TenSafeError):
        base_model_identity(model_folder)
