"""The correctness matrix: greedy answers under encryption equal PEFT's, whatever the batch, the adapters and the mode.

One engine per mode, float32. A table of agreement is printed at the end; an answer that differs shows how close the
two logits were at which it parts, and fails above `LARGEST_GAP`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.support.agreement import Agreement, Expected, greedy_all, reference_answers
from tests.support.private_adapters import PrivateAdapters, private_adapters
from tests.support.random_lora import write_random_lora
from tests.support.tiny_llama import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the demo model is not prepared (make model)"),
]

COUNTS, TOKENS = (1, 8, 32), 16
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Names, and what makes three adapters differ: rank, projections, layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "red": {"rank": 16, "strength": 0.05},
    "green": {"rank": 8, "targets": ("v_proj", "down_proj"), "strength": 0.2},
    "blue": {"rank": 4, "targets": ALL, "strength": 0.1},
}
OWNERS: dict[str, tuple[str | None, ...]] = {
    "base": (None,),
    "one adapter": ("red",),
    "three adapters": tuple(ADAPTERS),
}
PREFIX = (
    "You are a careful assistant who answers questions about history, science, law and cooking. Answer in one short "
    "paragraph, name no sources, and never repeat the question. If you do not know the answer, say so at once instead "
    "of guessing. Numbers are written in words up to twelve, dates as day, month and year, and names in full when they "
    "first appear. Units are metric. Do not use lists, headings or tables, and do not greet or thank the reader. Keep "
    "sentences short; prefer the active voice and the present tense wherever both are right. Where a question has more "
    "than one part, answer the parts in the order in which they were asked. Question: "
)
QUESTIONS = (
    "What is homomorphic encryption?",
    "Write a haiku about rain.",
    "One two three one two three one two three one two",
    "The capital of France is",
)


@dataclass(frozen=True, slots=True)
class Mode:
    """A row of the matrix: engine options beyond model and type. `tiny`: on a generated model instead of SmolLM2."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False


MODES = (
    Mode("plain", {"enable_prefix_caching": False}),
    Mode("prefix cache", {"enable_prefix_caching": True}),
    Mode("chunked prefill 64", {"max_num_batched_tokens": 64, "max_num_seqs": 32}),
    Mode("n-gram, k = 3", {"speculative_method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}),
    Mode("draft, k = 3", {"speculative_model": str(SMOLLM2), "num_speculative_tokens": 3}),
    Mode("compiled", {"enforce_eager": False}),
    # SmolLM2 has 9 heads and 3 KV heads.
    Mode("tensor parallel, 3", {"tensor_parallel_size": 3}),
    Mode("tensor parallel, 2", {"tensor_parallel_size": 2}, tiny=True),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its adapters' services, prompts, and what PEFT answers, by owner."""

    model: Path
    private: PrivateAdapters
    prompts: list[list[int]]
    expected: dict[str | None, list[Expected]]


def prepare(folder: Path, model: Path, prompts: list[list[int]]) -> Iterator[Subject]:
    adapters = {
        name: write_random_lora(folder / name, model, seed=seed, **options)
        for seed, (name, options) in enumerate(ADAPTERS.items(), 1)
    }
    paths: dict[str | None, Path | None] = {None: None, **adapters}
    expected = {owner: reference_answers(model, path, prompts, TOKENS) for owner, path in paths.items()}
    for answers in zip(*expected.values(), strict=True):
        assert len({tuple(answer.token_ids) for answer in answers}) > 1, "no adapter changes this answer"
    with private_adapters(folder, model, adapters) as private:
        yield Subject(model, private, prompts, expected)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Iterator[Subject]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
    texts = [*QUESTIONS, *(PREFIX + question for question in QUESTIONS)]
    prompts = [list(tokenizer(text).input_ids) for text in texts]
    assert len(tokenizer(PREFIX).input_ids) > 128, "the common beginning is shorter than a block of the cache"
    yield from prepare(tmp_path_factory.mktemp("smollm2"), SMOLLM2, prompts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 257, length).tolist() for length in (3, 20, 33, 64, 90, 128, 150, 200)]
    yield from prepare(folder, write_tiny_llama(folder / "model"), prompts)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    lines = [f"{'agreement with PEFT':<22}" + "".join(f"{f'{o}, {n}':>22}" for o in OWNERS for n in COUNTS)]
    yield lines
    manager = request.config.pluginmanager.getplugin("capturemanager")
    assert manager is not None
    with manager.global_and_fixture_disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_answers_are_peft_s(mode: Mode, request: pytest.FixtureRequest, table: list[str]) -> None:
    from tensorguard.backends.vllm.core import EngineCore
    from tensorguard.backends.vllm.options import EngineOptions

    subject: Subject = request.getfixturevalue("tiny" if mode.tiny else "smollm2")
    options = {"dtype": "float32", "max_model_len": 512, "served_model_name": "base", **mode.options}
    core = await EngineCore.start(
        EngineOptions(model=str(subject.model), **options),
        subject.private.connections,
        require_attestation=False,
        simulated_root_key=subject.private.simulated_root_key,
    )
    cells = {}
    try:
        for label, owners in OWNERS.items():
            for count in COUNTS:
                places = [(owners[i % len(owners)], i % len(subject.prompts)) for i in range(count)]
                answers = await greedy_all(core, [(owner, subject.prompts[p]) for owner, p in places], TOKENS)
                cell = cells[label, count] = Agreement()
                for (owner, place), answer in zip(places, answers, strict=True):
                    assert len(answer) == TOKENS
                    cell.add(answer, subject.expected[owner][place])
    finally:
        core.shutdown()
        table.append(f"{mode.name:<22}" + "".join(f"{cell!s:>22}" for cell in cells.values()))
    assert [place for place, cell in cells.items() if not cell.holds] == []
