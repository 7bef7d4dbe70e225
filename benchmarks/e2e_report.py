"""From the rounds of benchmarks/e2e.py to its records, table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODES = ("base", "plain_lora", "he_lora")
NAMES = {"base": "base model", "plain_lora": "plaintext LoRA (vLLM)", "he_lora": "HE-LoRA (TenSafe)"}
LEAST_THROUGHPUT = {1: 0.35, 8: 0.5, 32: 0.5}
"""What we aim at: tokens per second as a share of plaintext LoRA's, by concurrency."""
MOST_FIRST_TOKEN = 3.0
"""What we aim at: time to the first token, in plaintext LoRA's."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Requests that arrive together; prompt processing is included."""

    mode: str
    concurrency: int
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    ttft_ms: float
    bytes_up_per_token: float
    bytes_down_per_token: float
    shares: dict[str, float]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request alone, up to its first token."""

    mode: str
    prompt_tokens: int
    ttft_ms: float
    ttft_ms_min: float
    ttft_ms_max: float


@dataclass(slots=True)
class Report:
    """What was measured, on what, and with which options."""

    machine: str
    options: dict[str, Any]
    throughput: list[Throughput] = field(default_factory=list)
    first_token: list[FirstToken] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def throughput(mode: str, concurrency: int, results: Sequence[dict[str, Any]], prompt_tokens: int) -> Throughput:
    """Of several rounds: the median one, and the range."""
    speeds = sorted((result["tokens"] / result["seconds"], index) for index, result in enumerate(results))
    middle = results[speeds[(len(speeds) - 1) // 2][1]]
    # Every token's activations are encrypted, those of the prompt as well.
    processed = middle["tokens"] + concurrency * (prompt_tokens - 1)
    return Throughput(
        mode=mode,
        concurrency=concurrency,
        tokens_per_s=middle["tokens"] / middle["seconds"],
        tokens_per_s_min=speeds[0][0],
        tokens_per_s_max=speeds[-1][0],
        ttft_ms=statistics.median(value for result in results for value in result["ttft_ms"]),
        bytes_up_per_token=middle["he"].get("bytes_up", 0) / processed,
        bytes_down_per_token=middle["he"].get("bytes_down", 0) / processed,
        shares={name: round(value, 4) for name, value in shares(middle).items()},
    )


def first_token(mode: str, prompt_tokens: int, results: Sequence[dict[str, Any]]) -> FirstToken:
    """Of several rounds: the median, and the range."""
    times = [value for result in results for value in result["ttft_ms"]]
    return FirstToken(mode, prompt_tokens, statistics.median(times), min(times), max(times))


def shares(result: dict[str, Any]) -> dict[str, float]:
    """Parts of the wall time. The coprocessor works while the base product runs, so only waiting counts for it."""
    he, seconds = result["he"], result["seconds"]
    if not he:
        return {"base": 1.0}
    waiting = he["wait_seconds"]
    evaluate = min(he["evaluate_seconds"], waiting)
    parts = {
        "encrypt": he["encrypt_seconds"] / seconds,
        "evaluate": evaluate / seconds,
        "wire": (waiting - evaluate) / seconds,
        "decrypt": he["decrypt_seconds"] / seconds,
    }
    return {**parts, "base": 1.0 - sum(parts.values())}


def text(report: Report) -> str:
    """The tables, with what we aim at beside what was reached."""
    options = " ".join(f"{name}={value}" for name, value in report.options.items())
    throughputs, first_tokens = _throughput_lines(report.throughput), _first_token_lines(report.first_token)
    return "\n".join([report.machine, options, "", *throughputs, "", *first_tokens])


def _throughput_lines(records: Sequence[Throughput]) -> list[str]:
    lines = [
        f"{'mode':<11}{'conc.':>6}{'tok/s':>9}{'range':>16}{'of plain':>10}{'aim':>7}{'TTFT ms':>9}"
        f"{'up/token':>11}{'down/token':>12}  shares of the time"
    ]
    plain = {r.concurrency: r.tokens_per_s for r in records if r.mode == "plain_lora"}
    for r in records:
        aim = LEAST_THROUGHPUT.get(r.concurrency) if r.mode == "he_lora" else None
        spread = f"{r.tokens_per_s_min:.1f} to {r.tokens_per_s_max:.1f}"
        parts = ", ".join(f"{name} {value:.0%}" for name, value in r.shares.items())
        lines.append(
            f"{r.mode:<11}{r.concurrency:>6}{r.tokens_per_s:>9.1f}{spread:>16}"
            f"{r.tokens_per_s / plain[r.concurrency]:>10.2f}{f'{aim:.2f}' if aim else '':>7}{r.ttft_ms:>9.0f}"
            f"{r.bytes_up_per_token / 1e6:>8.2f} MB{r.bytes_down_per_token / 1e6:>9.2f} MB  {parts}"
        )
    return lines


def _first_token_lines(records: Sequence[FirstToken]) -> list[str]:
    lines = [f"{'mode':<11}{'prompt':>7}{'TTFT ms':>9}{'range':>18}{'x plain':>9}{'aim':>6}"]
    plain = {r.prompt_tokens: r.ttft_ms for r in records if r.mode == "plain_lora"}
    for r in records:
        aim = f"{MOST_FIRST_TOKEN:.0f}" if r.mode == "he_lora" else ""
        spread = f"{r.ttft_ms_min:.0f} to {r.ttft_ms_max:.0f}"
        ratio = r.ttft_ms / plain[r.prompt_tokens]
        lines.append(f"{r.mode:<11}{r.prompt_tokens:>7}{r.ttft_ms:>9.0f}{spread:>18}{ratio:>9.2f}{aim:>6}")
    return lines


def draw(report: Report, path: Path) -> None:
    """Tokens per second, time to the first token, and the shares of HE-LoRA's time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, first, parts) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    counts = sorted({r.concurrency for r in report.throughput})
    _bars(
        speed,
        [f"{n} concurrent" for n in counts],
        {
            mode: [
                next(r.tokens_per_s for r in report.throughput if (r.mode, r.concurrency) == (mode, n)) for n in counts
            ]
            for mode in MODES
        },
    )
    speed.set_ylabel("generated tokens per second")
    lengths = sorted({r.prompt_tokens for r in report.first_token})
    _bars(
        first,
        [f"{n} tokens" for n in lengths],
        {
            mode: [
                next(r.ttft_ms / 1e3 for r in report.first_token if (r.mode, r.prompt_tokens) == (mode, n))
                for n in lengths
            ]
            for mode in MODES
        },
        "%.2g",
    )
    first.set_yscale("log")
    first.set_ylabel("seconds to the first token, by prompt")
    speed.legend(fontsize=8)
    private = [r for r in report.throughput if r.mode == "he_lora"]
    bottom = [0.0] * len(private)
    for name in ("base", "encrypt", "wire", "evaluate", "decrypt"):
        values = [max(r.shares[name], 0.0) for r in private]
        parts.bar(range(len(private)), values, 0.5, bottom=bottom, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    parts.set_xticks(range(len(private)), [f"{r.concurrency} concurrent" for r in private])
    parts.set_ylabel("share of HE-LoRA's wall time")
    parts.legend(fontsize=8)
    figure.suptitle(report.machine, fontsize=9)
    figure.savefig(path, dpi=110)


def _bars(axes: Any, labels: Sequence[str], values: dict[str, list[float]], form: str = "%.0f") -> None:
    for position, mode in enumerate(values):
        places = [index + 0.27 * (position - 1) for index in range(len(labels))]
        axes.bar_label(axes.bar(places, values[mode], 0.25, label=NAMES[mode]), fmt=form, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
