"""The committed demo adapter: well-formed, small, portable, and with the effect its report claims."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

FOLDER = Path(__file__).parents[2] / "examples" / "demo_adapter"
ADAPTER = FOLDER / "adapter"
WEIGHTS = ADAPTER / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return dict(json.loads((ADAPTER / "report.json").read_text(encoding="utf-8")))


def test_the_weights_are_those_of_the_report_and_under_5_mb(report: dict[str, Any]) -> None:
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == report["adapter"]["sha256"]
    assert WEIGHTS.stat().st_size < 5_000_000


def test_every_layer_has_both_halves_of_all_four_projections() -> None:
    weights = load_file(WEIGHTS)
    out_channels = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576}
    prefix = "base_model.model.model.layers"
    expected: dict[str, tuple[int, int]] = {}
    for layer in range(30):
        for projection, channels in out_channels.items():
            expected[f"{prefix}.{layer}.self_attn.{projection}.lora_A.weight"] = (16, 576)
            expected[f"{prefix}.{layer}.self_attn.{projection}.lora_B.weight"] = (channels, 16)
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    for name, tensor in weights.items():
        assert tensor.dtype == np.float16
        assert np.isfinite(tensor).all(), name
        assert np.abs(tensor).max() > 0, name  # trained: PEFT starts with B = 0


def test_the_configuration_is_standard_and_names_no_place_on_a_machine() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 32)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    for name in ("adapter/adapter_config.json", "adapter/report.json", "README.md", "train.py", "corpus.py"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"[\"' (](/work|/home|/root|/tmp|/Users)/", text), name


def test_the_report_shows_the_effect(report: dict[str, Any]) -> None:
    perplexity = report["held_out_perplexity"]
    assert perplexity["adapter"] < 0.7 * perplexity["base"]
    assert not set(report["dataset"]["training_books"]) & set(report["dataset"]["held_out_books"])
    assert len(report["answers"]) == 20
    assert sum(entry["base"] != entry["adapter"] for entry in report["answers"]) >= 15
    assert report["archaic_word_share"]["adapter"] > 5 * report["archaic_word_share"]["base"]


@pytest.mark.e2e
def test_unmodified_peft_loads_it_and_its_answers_differ_and_are_long() -> None:
    """The 20 prompts of the folder, greedy, 64 tokens each, against the base model (minutes)."""
    from tensorguard.models.reference import ReferenceModel, answer_all
    from tensorguard.models.smollm2 import prepare_smollm2

    base = prepare_smollm2(FOLDER.parents[1] / ".cache" / "models")
    texts = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    adapted_model = ReferenceModel(base, ADAPTER)
    adapted = answer_all(adapted_model, prompts, 64)
    plain = answer_all(ReferenceModel(base), prompts, 64)
    assert sum(a.token_ids != b.token_ids for a, b in zip(adapted, plain, strict=True)) >= 15
    assert sum(len(answer.token_ids) == 64 for answer in adapted) >= 15
