"""Train the demo adapter: SmolLM2-135M-Instruct answering in King James English.

A LoRA (PEFT, rank 16 on q, k, v and o) trained on the CPU in float32, in about ten minutes on two cores.
Prints the held-out perplexity of the base model and of the adapter *as saved* (float16), and how its answers
to twenty ordinary questions differ from the base model's. Writes the adapter and `report.json`.

Run `make demo-adapter`, or `python examples/demo_adapter/train.py --help`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorguard.models.smollm2 import prepare_smollm2

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PASSAGE_TOKENS = (80, 110)
PROMPTS = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
ANSWER_TOKENS = 80
ARCHAIC = re.compile(
    r"\b(thou|thee|thy|thine|ye|unto|hath|hast|shalt|doth|saith|behold|lest|wherefore|nay|spake|begat|upon|"
    r"thereof|therein|[a-z]{3,}eth)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the result depends on, besides the versions of the libraries."""

    seed: int = 20
    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    steps: int = 64
    batch: int = 4
    learning_rate: float = 2.5e-3
    warmup: int = 5
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    held_out: int = 24


def encode(tokenizer: Any, example: corpus.Example) -> tuple[list[int], int]:
    """Return the conversation's token ids and how many of them are the prompt's (which carry no loss)."""
    prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(example.answer, add_special_tokens=False).input_ids
    return prompt_ids + answer_ids + [tokenizer.eos_token_id], len(prompt_ids)


def answer_loss(model: Any, batch: Sequence[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, int]:
    """Sum of the answers' token cross-entropies (nats), and the number of those tokens."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
    attention = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.full_like(ids, -100)
    for row, (tokens, prompt) in enumerate(batch):
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    targets = labels[:, 1:]
    wanted = targets != -100
    backbone, head = model.get_base_model().model, model.get_base_model().lm_head
    hidden = backbone(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state[:, :-1]
    # Only the answers' positions pass the output layer, a fifth of the work.
    loss = torch.nn.functional.cross_entropy(head(hidden[wanted]), targets[wanted], reduction="sum")
    return loss, int(wanted.sum())


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip


@torch.no_grad()
def perplexity(model: Any, data: Sequence[tuple[list[int], int]], pad: int) -> float:
    """exp of the mean cross-entropy over all answer tokens of `data`."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data), 4):
        loss, tokens = answer_loss(model, data[start : start + 4], pad)
        total += loss.item()
        count += tokens
    return math.exp(total / count)


def train(model: Any, data: list[tuple[list[int], int]], pad: int, recipe: Recipe) -> list[float]:
    """Train in place; return the loss (nats per answer token) of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_share(step, recipe))
    order = list(range(len(data)))
    random.Random(recipe.seed).shuffle(order)
    model.train()
    losses = []
    with progress_bar() as progress:
        task = progress.add_task("Training", total=recipe.steps, note="")
        for step in range(recipe.steps):
            chosen = [data[order[(step * recipe.batch + k) % len(order)]] for k in range(recipe.batch)]
            loss, tokens = answer_loss(model, chosen, pad)
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.item() / tokens)
            note = f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}"
            progress.update(task, advance=1, note=note)
            if not progress.console.is_terminal and (step + 1) % 10 == 0:
                print(f"Training: step {step + 1} of {recipe.steps}, {note}", flush=True)
    return losses


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[str]:
    """Greedy answers to the demo prompts, in one left-padded batch."""
    model.eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in PROMPTS
    ]
    inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    return [tokenizer.decode(row[inputs.input_ids.shape[1] :], skip_special_tokens=True) for row in output]


def save_adapter(model: Any, folder: Path) -> None:
    """Write PEFT's two files: weights as float16 (PEFT loads them as float32), configuration sorted."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        weights = load_file(Path(scratch) / "adapter_model.safetensors")
        config = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
        halved = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
        save_file(halved, Path(scratch) / "half.safetensors", metadata={"format": "pt"})
        config["base_model_name_or_path"] = BASE_MODEL
        config["target_modules"] = sorted(config["target_modules"])
        shutil.copyfile(Path(scratch) / "half.safetensors", folder / "adapter_model.safetensors")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def archaic_share(text: str) -> float:
    """Share of words that King James English has and the base model's English has not."""
    return len(ARCHAIC.findall(text)) / max(1, len(text.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache", help="where model and corpus are kept")
    parser.add_argument("--output", type=Path, default=HERE / "adapter", help="folder for the adapter and report.json")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, seed=options.seed)
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()

    base = prepare_smollm2(options.cache / "models", lambda line: print(line, flush=True))
    text = corpus.obtain_corpus(options.cache / "demo-corpus")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    pad = tokenizer.pad_token_id

    def read(books: Sequence[str]) -> list[str]:
        return corpus.read_passages(text, books, lambda verse: len(tokenizer(verse).input_ids), PASSAGE_TOKENS)

    print("Reading the corpus", flush=True)
    generator = random.Random(recipe.seed)
    training = corpus.make_examples(read(corpus.TRAINING_BOOKS), generator, corpus.MODERN_SHARE)
    held_out = corpus.make_examples(read(corpus.HELD_OUT_BOOKS), generator, 0.0)
    held_out = generator.sample(held_out, min(recipe.held_out, len(held_out)))
    training_data = [encode(tokenizer, example) for example in training]
    held_out_data = [encode(tokenizer, example) for example in held_out]
    print(f"{len(training)} training examples, {len(held_out)} held out ({', '.join(corpus.HELD_OUT_BOOKS)})")

    torch.manual_seed(recipe.seed)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    settings = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base_model, settings)
    print("Measuring the base model", flush=True)
    with model.disable_adapter():
        before = perplexity(model, held_out_data, pad)
        base_answers = answers(model, tokenizer)
    losses = train(model, training_data, pad, recipe)
    options.output.mkdir(parents=True, exist_ok=True)
    save_adapter(model, options.output)

    print("Measuring the adapter as saved", flush=True)
    saved = PeftModel.from_pretrained(model.unload(), options.output)
    after = perplexity(saved, held_out_data, pad)
    adapter_answers = answers(saved, tokenizer)
    different = sum(a != b for a, b in zip(base_answers, adapter_answers, strict=True))

    weights = options.output / "adapter_model.safetensors"
    report = {
        "base_model": {"name": BASE_MODEL, "weights": "dequantised Q4_1, see docs/demo-adapter.md"},
        "recipe": {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__},
        "dataset": {
            "package": corpus.PACKAGE,
            "file": corpus.CORPUS_FILE,
            "sha256": corpus.CORPUS_SHA256,
            "training_books": corpus.TRAINING_BOOKS,
            "held_out_books": corpus.HELD_OUT_BOOKS,
            "training_examples_available": len(training),
            "training_examples_seen": min(len(training), recipe.steps * recipe.batch),
            "held_out_examples": len(held_out),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "adapter": {
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "held_out_perplexity": {"base": round(before, 3), "adapter": round(after, 3)},
        "answers_that_differ": {"prompts": len(PROMPTS), "different": different},
        "archaic_word_share": {
            "base": round(archaic_share(" ".join(base_answers)), 4),
            "adapter": round(archaic_share(" ".join(adapter_answers)), 4),
        },
        "seconds": round(time.monotonic() - started),
        "loss_curve": [round(loss, 4) for loss in losses],
        "answers": [
            {"prompt": prompt, "base": plain, "adapter": adapted}
            for prompt, plain, adapted in zip(PROMPTS, base_answers, adapter_answers, strict=True)
        ],
    }
    (options.output / "report.json").write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"\nPrompt: {PROMPTS[0]}\n  base:    {base_answers[0]}\n  adapter: {adapter_answers[0]}\n")
    print(f"Held-out perplexity: base {before:.2f}, adapter {after:.2f}")
    print(f"Answers that differ from the base model's: {different} of {len(PROMPTS)}")
    print(f"Adapter and report.json written to {options.output} in {report['seconds']} s")
    if after >= before or different < 15:
        print("error: the adapter does not do its work", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
