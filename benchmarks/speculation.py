"""Speculative decoding through a private adapter: tokens per second and acceptance against k, in one run.

    python benchmarks/speculation.py [--json FILE] [--picture FILE] [--quick]

The demo adapter answers chat prompts greedily, without speculation, with n-gram lookup and with the unadapted base
model as its own draft (it runs without encryption), for each k. One engine after the other serves the same prompts;
the run without speculation is repeated at the end, which shows how much the machine's speed drifted. Each record has
method (none, ngram, draft_model), k, concurrency, tokens_per_s (median of the rounds; prompt processing included),
acceptance (accepted of guessed tokens), tokens_per_step (what one request gains from one step), bytes_up_per_token,
and how many of the answers equal those of the first run (all, but for ties of the dtype). The JSON's text goes to a
file of the same name with the suffix .txt, and to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e2e import ROOT, processor, say, seal

METHODS = {"none": "no speculation", "ngram": "n-gram lookup", "draft_model": "base model as draft"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Record:
    """What one engine did at one concurrency."""

    method: str
    k: int
    concurrency: int
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    acceptance: float | None
    tokens_per_step: float
    bytes_up_per_token: float
    answers: int
    equal_answers: int


@dataclass(frozen=True)
class Round:
    """One measurement: answers of all prompts, and what the hooks counted meanwhile."""

    seconds: float
    answers: list[list[int]]
    counted: dict[str, float]


def chat_prompts(model: Path, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    questions = json.loads((ROOT / "examples" / "demo_adapter" / "prompts.json").read_text())[:count]
    texts = (
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    )
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


async def counters(engine: Any) -> dict[str, float]:
    status = await engine.status()
    (adapter,) = status["adapters"]
    hooks = {name: status[name] for name in ("adapted_rows", "adapted_requests")}
    return {**hooks, "bytes_up": adapter["bytes_up"]}


async def measure(engine: Any, prompts: list[list[int]], concurrency: int, tokens: int) -> Round:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    core = await engine.start()
    route = core.route(next(iter(core.adapters)))
    sampling = SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    slots = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> list[int]:
        async with slots:
            answer: list[int] = []
            async for output in route.generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex):
                answer = list(output.outputs[0].token_ids)
            return answer

    before = await counters(engine)
    begun = time.perf_counter()
    answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - begun
    after = await counters(engine)
    return Round(seconds, answers, {name: after[name] - before[name] for name in after})


def record(
    method: str, k: int, concurrency: int, rounds: list[Round], prompts: list[list[int]], first: list[list[int]]
) -> Record:
    speeds = [sum(map(len, r.answers)) / r.seconds for r in rounds]
    counted, tokens = rounds[0].counted, sum(map(len, rounds[0].answers))
    # Prompts are short: each takes one step, which yields the first token. Every later step of a request has a row for
    # the last token and one for each guess, and yields one token more than guesses were accepted. A right guess beyond
    # the last token that was asked for counts as not accepted.
    steps = counted["adapted_requests"] - len(prompts)
    guessed = counted["adapted_rows"] - sum(map(len, prompts)) - steps
    accepted = tokens - len(prompts) - steps
    return Record(
        method=method,
        k=k,
        concurrency=concurrency,
        tokens_per_s=statistics.median(speeds),
        tokens_per_s_min=min(speeds),
        tokens_per_s_max=max(speeds),
        acceptance=accepted / guessed if guessed else None,
        tokens_per_step=(tokens - len(prompts)) / steps,
        bytes_up_per_token=counted["bytes_up"] / tokens,
        answers=len(rounds) * len(prompts),
        equal_answers=sum(a == b for r in rounds for a, b in zip(r.answers, first, strict=True)),
    )


async def run(options: argparse.Namespace) -> list[Record]:
    from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig

    prompts = chat_prompts(options.model, options.prompts)
    plans = [("none", 0), *((method, k) for method in ("ngram", "draft_model") for k in options.k), ("none", 0)]
    records: list[Record] = []
    first: list[list[int]] = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "attestor"
        package = seal(options.model, options.adapter, state)
        for method, k in plans:
            extra = {} if method == "none" else {"speculative_method": method, "num_speculative_tokens": k}
            if method == "draft_model":
                extra["speculative_model"] = str(options.model)
            config = TenSafeVLLMConfig(
                model=str(options.model),
                tssp_package_path=package,
                enable_he_lora=True,
                require_attestation=False,
                state_dir=state,
                dtype=options.dtype,
                max_model_len=1024,
                # Every round computes every prompt.
                enable_prefix_caching=False,
                **extra,
            )
            async with TenSafeAsyncEngine(config) as engine:
                await measure(engine, prompts[:1], 1, 8)
                for concurrency in options.concurrency:
                    rounds = [
                        await measure(engine, prompts, concurrency, options.max_tokens) for _ in range(options.rounds)
                    ]
                    first = first or rounds[0].answers
                    records.append(record(method, k, concurrency, rounds, prompts, first))
                    say(line(records[-1]))
    return records


HEADER = (
    f"{'method':<12}{'k':>3}{'conc.':>6}{'tok/s':>9}{'range':>15}{'acceptance':>12}{'tokens/step':>13}{'up/token':>11}"
    f"{'equal answers':>15}"
)


def line(r: Record) -> str:
    acceptance = "-" if r.acceptance is None else f"{r.acceptance:.0%}"
    spread = f"{r.tokens_per_s_min:.1f} to {r.tokens_per_s_max:.1f}"
    return (
        f"{r.method:<12}{r.k:>3}{r.concurrency:>6}{r.tokens_per_s:>9.1f}{spread:>15}{acceptance:>12}"
        f"{r.tokens_per_step:>13.2f}{r.bytes_up_per_token / 1e6:>8.2f} MB{f'{r.equal_answers}/{r.answers}':>15}"
    )


def draw(records: list[Record], machine: str, path: Path) -> None:
    """Speed against k at each concurrency, and acceptance, which does not depend on it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({r.concurrency for r in records})
    figure, panels = plt.subplots(1, len(counts) + 1, figsize=(4.5 * (len(counts) + 1), 4), layout="constrained")
    for axes, count in zip(panels, counts, strict=False):
        chosen = [r for r in records if r.concurrency == count]
        without = statistics.mean(r.tokens_per_s for r in chosen if r.method == "none")
        axes.axhline(without, color="grey", linestyle="--", label=METHODS["none"])
        for method in ("ngram", "draft_model"):
            points = [r for r in chosen if r.method == method]
            axes.plot([r.k for r in points], [r.tokens_per_s for r in points], marker="o", label=METHODS[method])
        axes.set_ylabel(f"generated tokens per second, {count} concurrent")
    for method in ("ngram", "draft_model"):
        points = [r for r in records if (r.method, r.concurrency) == (method, counts[0])]
        panels[-1].plot([r.k for r in points], [r.acceptance or 0 for r in points], marker="o", label=METHODS[method])
    panels[-1].set_ylabel("share of the guesses that were accepted")
    for axes in panels:
        axes.set_xlabel("k, tokens guessed ahead")
        axes.set_xticks(sorted({r.k for r in records if r.k}))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here, and the table beside it")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG or SVG file")
    parser.add_argument("--quick", action="store_true", help="one k, few prompts: shows that it runs, not how fast")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the demo model)")
    parser.add_argument("--adapter", type=Path, default=ROOT / "examples" / "demo_adapter" / "adapter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    if options.quick:
        options.k, options.concurrency, options.prompts, options.rounds, options.max_tokens = [3], [1], 2, 1, 16
    if options.model is None:
        from tensorguard.models.smollm2 import prepare_smollm2

        options.model = prepare_smollm2(ROOT / ".cache" / "models", say)
    machine = f"{processor()}, {os.cpu_count()} processors, {options.dtype}, {options.model.name}, demo adapter"
    say(machine)
    records = asyncio.run(run(options))
    size = {name: getattr(options, name) for name in ("prompts", "rounds", "max_tokens")}
    sizes = " ".join(f"{name}={value}" for name, value in size.items())
    table = "\n".join([machine, sizes, "", HEADER, *(line(r) for r in records)])
    print(table)
    if options.json:
        content = {"machine": machine, "options": size, "records": [asdict(r) for r in records]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        options.json.with_suffix(".txt").write_text(table + "\n")
    if options.picture:
        draw(records, machine, options.picture)


if __name__ == "__main__":
    main()
