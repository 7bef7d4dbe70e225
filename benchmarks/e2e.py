"""Throughput through the private adapter, beside vLLM's own plaintext LoRA and the bare base model, in one run.

    python benchmarks/e2e.py [--json FILE] [--picture FILE] [--quick]

Three engines run as separate processes with the same model, dtype and limits. Rounds alternate between them, so that
a machine whose speed drifts treats all alike; medians are reported. Prompts are random tokens and never repeat. Each
record has mode (base, plain_lora, he_lora), concurrency, tokens_per_s (prompt processing included), ttft_ms,
bytes_up_per_token, bytes_down_per_token and shares: the parts of the wall time spent encrypting, waiting for the wire
and for the coprocessor's evaluation beyond the base product, decrypting, and in everything else (base).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODES = ("base", "plain_lora", "he_lora")
TENANT = "benchmark"


@dataclass
class Worker:
    """An engine process."""

    mode: str
    process: subprocess.Popen[str]

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.mode} engine ended with code {self.process.wait()}; its output is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def seal(model: Path, adapter: Path, folder: Path) -> Path:
    """A sealed package of the adapter with its key in an attestor state below `folder`."""
    from tensorguard.crypto.signatures import SigningKeys
    from tensorguard.package.publishers import remember_publisher
    from tensorguard.package.registry import PackageKeyRegistry
    from tensorguard.package.writer import pack_adapter

    folder.mkdir(mode=0o700)
    keys, registry, package = SigningKeys.generate(), PackageKeyRegistry(folder), folder / "demo.tssp"
    pack_adapter(
        adapter,
        package,
        base_model_dir=model,
        tenant=TENANT,
        package_id="demo",
        sequence=1,
        signing_keys=keys,
        key_registrar=registry.register,
    )
    remember_publisher(folder, keys.public)
    return package


def start_workers(options: argparse.Namespace, package: Path, state: Path) -> list[Worker]:
    workers = []
    for mode in MODES:
        say(f"starting the {mode} engine")
        command = [sys.executable, str(ROOT / "benchmarks" / "engine_worker.py"), "--mode", mode]
        command += [
            "--model",
            str(options.model),
            "--adapter",
            str(options.adapter.resolve()),
            "--dtype",
            options.dtype,
        ]
        command += ["--package", str(package), "--state-dir", str(state)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        worker = Worker(mode, process)
        workers.append(worker)
        worker.answer()
    return workers


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


def record(mode: str, concurrency: int, results: list[dict[str, Any]], prompt_tokens: int) -> dict[str, Any]:
    middle = sorted(results, key=lambda result: result["tokens"] / result["seconds"])[(len(results) - 1) // 2]
    # Every token's activations are encrypted, those of the prompt as well.
    processed = middle["tokens"] + concurrency * (prompt_tokens - 1)
    return {
        "mode": mode,
        "concurrency": concurrency,
        "tokens_per_s": middle["tokens"] / middle["seconds"],
        "tokens_per_s_min": min(result["tokens"] / result["seconds"] for result in results),
        "tokens_per_s_max": max(result["tokens"] / result["seconds"] for result in results),
        "ttft_ms": statistics.median(value for result in results for value in result["ttft_ms"]),
        "bytes_up_per_token": middle["he"].get("bytes_up", 0) / processed,
        "bytes_down_per_token": middle["he"].get("bytes_down", 0) / processed,
        "shares": {name: round(value, 4) for name, value in shares(middle).items()},
    }


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        f"{'mode':<11}{'conc.':>6}{'tok/s':>9}{'of plain':>10}{'TTFT ms':>9}{'up/token':>11}{'down/token':>12}  shares"
    ]
    plain = {r["concurrency"]: r["tokens_per_s"] for r in records if r["mode"] == "plain_lora"}
    for r in records:
        ratio = r["tokens_per_s"] / plain[r["concurrency"]]
        parts = " ".join(f"{name} {value:.0%}" for name, value in r["shares"].items())
        lines.append(
            f"{r['mode']:<11}{r['concurrency']:>6}{r['tokens_per_s']:>9.1f}{ratio:>10.2f}{r['ttft_ms']:>9.0f}"
            f"{r['bytes_up_per_token'] / 1e6:>8.2f} MB{r['bytes_down_per_token'] / 1e6:>9.2f} MB  {parts}"
        )
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Bars of tokens per second, and of the shares of HE-LoRA's time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, parts) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counts = sorted({r["concurrency"] for r in records})
    for position, mode in enumerate(MODES):
        values = [
            next(r["tokens_per_s"] for r in records if (r["mode"], r["concurrency"]) == (mode, n)) for n in counts
        ]
        places = [i + 0.27 * (position - 1) for i in range(len(counts))]
        bars = speed.bar(
            places,
            values,
            0.25,
            label={"base": "base model", "plain_lora": "plaintext LoRA (vLLM)", "he_lora": "HE-LoRA (TenSafe)"}[mode],
        )
        speed.bar_label(bars, fmt="%.0f", fontsize=8)
    speed.set_xticks(range(len(counts)), [f"{n} concurrent" for n in counts])
    speed.set_ylabel("generated tokens per second")
    speed.legend(fontsize=8)
    private = [r for r in records if r["mode"] == "he_lora"]
    bottom = [0.0] * len(private)
    for name in ("base", "encrypt", "wire", "evaluate", "decrypt"):
        values = [max(r["shares"][name], 0.0) for r in private]
        parts.bar(range(len(private)), values, 0.5, bottom=bottom, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    parts.set_xticks(range(len(private)), [f"{r['concurrency']} concurrent" for r in private])
    parts.set_ylabel("share of HE-LoRA's wall time")
    parts.legend(fontsize=8)
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG or SVG file")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs, not how fast")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the demo model)")
    parser.add_argument("--adapter", type=Path, default=ROOT / "examples" / "demo_adapter" / "adapter")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.max_tokens, options.prompt_tokens = 1, 8, 16
    if options.model is None:
        from tensorguard.models.smollm2 import prepare_smollm2

        options.model = prepare_smollm2(ROOT / ".cache" / "models", say)
    machine = f"{processor()}, {os.cpu_count()} processors, {options.dtype}, {options.model.name}, r = 16 on q, k, v, o"
    say(machine)
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "attestor"
        say("sealing the adapter")
        package = seal(options.model, options.adapter, state)
        try:
            workers = start_workers(options, package, state)
            seed = 0
            for count in options.concurrency:
                for number in range(options.rounds + 1):
                    for worker in workers:
                        seed += 1
                        command = {"concurrency": count, "prompt_tokens": options.prompt_tokens}
                        result = worker.ask({**command, "max_tokens": options.max_tokens, "seed": seed})
                        speed = result["tokens"] / result["seconds"]
                        name = "warm-up" if number == 0 else f"round {number} of {options.rounds}"
                        say(f"{name}: {worker.mode}, {count} concurrent: {speed:.1f} tokens/s")
                        if number:
                            results.setdefault((worker.mode, count), []).append(result)
        finally:
            for worker in workers:
                assert worker.process.stdin is not None
                worker.process.stdin.close()
            for worker in workers:
                worker.process.wait(60)
    records = [
        record(mode, count, results[mode, count], options.prompt_tokens)
        for count in options.concurrency
        for mode in MODES
    ]
    print(machine)
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    if options.picture:
        draw(records, machine, options.picture)


if __name__ == "__main__":
    main()
