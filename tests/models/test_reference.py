"""The plaintext reference: greedy, float32, with and without an adapter, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorguard.errors import ConfigurationError, InvalidInputError
from tensorguard.models import reference

TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + ' </s> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
WORDS = ["<s>", "</s>", "user", "assistant", *(f"w{number}" for number in range(44))]
CHAT = {"messages": [{"role": "user", "content": "w3 w1 w4"}]}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose generation defaults would spoil greedy decoding if they were used."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=1.8, eos_token_id=1, pad_token_id=1
    )
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a large effect, stored in float16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(2)
    model = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data * (3.0 if parameter.requires_grad else 1.0)
    folder = tmp_path_factory.mktemp("adapter")
    model.half().save_pretrained(folder)
    return folder


def greedy_by_hand(model: Any, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy decoding without cache: the whole sequence again for every token."""
    import torch

    ids, steps = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        steps.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        ids.append(steps[-1][0])
    return steps


@pytest.mark.parametrize("adapted", [False, True])
def test_generation_is_plain_greedy_whatever_the_model_defaults_to(
    tiny_model: Path, tiny_adapter: Path, adapted: bool
) -> None:
    model = reference.ReferenceModel(tiny_model, tiny_adapter if adapted else None)
    answer = model.answer(CHAT, 20, ignore_eos=True)
    expected = greedy_by_hand(model.model, answer.prompt_token_ids, 20)
    assert answer.token_ids == [token for token, _ in expected]
    assert answer.gaps == pytest.approx([gap for _, gap in expected], abs=1e-4)
    assert {str(parameter.dtype) for parameter in model.model.parameters()} == {"torch.float32"}


def test_the_adapter_changes_the_answer(tiny_model: Path, tiny_adapter: Path) -> None:
    plain = reference.ReferenceModel(tiny_model).answer(CHAT, 12, ignore_eos=True)
    adapted = reference.ReferenceModel(tiny_model, tiny_adapter).answer(CHAT, 12, ignore_eos=True)
    assert plain.prompt_token_ids == adapted.prompt_token_ids
    assert plain.token_ids != adapted.token_ids


def test_an_end_token_ends_the_answer_unless_it_is_ignored(tiny_model: Path) -> None:
    model = reference.ReferenceModel(tiny_model)
    endless = model.answer(CHAT, 12, ignore_eos=True)
    end = endless.token_ids[4]
    model._end_tokens = end
    ended = model.answer(CHAT, 12)
    first = endless.token_ids.index(end)
    assert ended.token_ids == endless.token_ids[: first + 1]
    assert len(ended.gaps) == first + 1
    assert len(model.answer(CHAT, 12, ignore_eos=True).token_ids) == 12


def test_prompts_are_encoded_as_a_chat_as_text_or_as_they_are(tiny_model: Path) -> None:
    model = reference.ReferenceModel(tiny_model)
    chat = [WORDS.index(word) for word in ["<s>", "user", "w3", "w1", "w4", "</s>", "<s>", "assistant"]]
    assert model.encode(CHAT) == chat
    assert model.encode({"prompt": "w3 w1 w4"}) == chat[2:5]
    assert model.encode({"prompt_token_ids": chat}) == chat


@pytest.mark.parametrize("prompt", [{}, {"prompt": "w1", "messages": []}, {"prompt_token_ids": []}])
def test_an_unclear_prompt_is_refused(tiny_model: Path, prompt: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        reference.ReferenceModel(tiny_model).answer(prompt, 1)


def test_the_command_writes_one_answer_per_prompt(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.json", tmp_path / "answers.json"
    prompts.write_text(json.dumps([CHAT, {"prompt": "w5"}]), encoding="utf-8")
    arguments = ["--model", str(tiny_model), "--adapter", str(tiny_adapter), "--prompts", str(prompts)]
    assert reference.main([*arguments, "--max-tokens", "5", "--ignore-eos", "--json", str(output)]) == 0
    answers = json.loads(output.read_text(encoding="utf-8"))
    assert [len(answer["token_ids"]) for answer in answers] == [5, 5]
    assert answers[0].keys() == {"prompt_token_ids", "token_ids", "text", "gaps"}
    assert "2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--model", "--adapter", "--prompts"])
def test_a_missing_input_is_one_error_line_before_anything_is_loaded(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "prompts.json").write_text("[]", encoding="utf-8")
    options = {"--model": tmp_path, "--adapter": tmp_path, "--prompts": tmp_path / "prompts.json"}
    options[missing] = tmp_path / "absent"
    arguments = [str(part) for option in options.items() for part in option]
    assert reference.main([*arguments, "--max-tokens", "1", "--json", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "absent" in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '["a"]'])
def test_a_malformed_prompts_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInputError):
        reference.read_prompts(path)


def test_a_missing_library_is_named(tiny_model: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match="peft"):
        reference.ReferenceModel(tiny_model, tiny_adapter)
