"""Captured activations are what the projections of the model really multiply."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorguard.errors import ConfigurationError, InvalidInputError
from tensorguard.models.activations import capture
from tests.models.test_reference import tiny_model

__all__ = ["tiny_model"]  # a fixture

CHATS = [
    [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4"}],
    [{"role": "user", "content": "w5 w6"}],
]


def test_each_group_has_the_inputs_of_its_projections(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    captured = capture(tiny_model, CHATS, 10_000)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = model.config
    assert captured.keys() == {
        (layer, group) for layer in range(config.num_hidden_layers) for group in ("qkv", "o", "gate_up", "down")
    }
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    for (_, group), x in captured.items():
        width = config.intermediate_size if group == "down" else config.hidden_size
        assert x.dtype == np.float32 and x.shape == (sum(counts), width)
    # The first layer's input is the normalised embedding: computed here by hand.
    ids = tokenizer(texts[0], add_special_tokens=False).input_ids
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.tensor(ids)).double()
    scale = model.model.layers[0].input_layernorm.weight.detach().double()
    expected = embedded / (embedded.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * scale
    np.testing.assert_allclose(captured[0, "qkv"][: len(ids)], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_groups_and_tokens_can_be_limited(tiny_model: Path) -> None:
    whole = capture(tiny_model, CHATS, 10_000)[1, "down"]
    few = capture(tiny_model, CHATS, 3, {(1, "down")})
    assert few.keys() == {(1, "down")}
    np.testing.assert_array_equal(few[1, "down"], whole[[0, (len(whole) - 1) // 2, len(whole) - 1]])


@pytest.mark.parametrize(("chats", "tokens"), [([], 10), (CHATS, 0)])
def test_nothing_captured_is_an_error(tiny_model: Path, chats: list[list[dict[str, str]]], tokens: int) -> None:
    with pytest.raises(InvalidInputError, match="no activations"):
        capture(tiny_model, chats, tokens)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        capture(tmp_path, CHATS, 1)
