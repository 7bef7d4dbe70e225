"""Throughput and time to the first token through the private adapter, beside vLLM's own plaintext LoRA and the bare
base model, in one run.

    python benchmarks/e2e.py [--json FILE] [--picture FILE] [--quick]

Three engines run as separate processes with the same model, dtype and limits. Rounds alternate between them, so that
a machine whose speed drifts treats all alike; medians are reported. Prompts are random tokens and never repeat, so
that no cache helps. The JSON's text goes to a file of the same name with the suffix .txt, and to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_report import MODES, Report, draw, first_token, text, throughput

ROOT = Path(__file__).resolve().parent.parent
TENANT = "benchmark"
WARM_UP_TOKENS = 4


@dataclass
class Worker:
    """An engine process."""

    mode: str
    process: subprocess.Popen[str]
    measured: int = 0

    def measure(self, command: dict[str, Any]) -> dict[str, Any]:
        """With other prompts each time: vLLM's prefix cache knows those before. All modes get the same ones."""
        self.measured += 1
        return self.ask({**command, "seed": self.measured})

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
    from tensorguard.package.writer import pack_adapter
    from tensorguard.store.state import AttestorState

    folder.mkdir(mode=0o700)
    keys, registry, package = SigningKeys.generate(), AttestorState.open(folder).packages, folder / "demo.tssp"
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
        command += ["--model", str(options.model), "--adapter", str(options.adapter.resolve())]
        command += ["--dtype", options.dtype, "--package", str(package), "--state-dir", str(state)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        worker = Worker(mode, process)
        workers.append(worker)
        worker.answer()
    return workers


def alternate(
    workers: list[Worker], rounds: int, what: str, command: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Results of the same command by mode, round by round, after a short one that warms up."""
    results: dict[str, list[dict[str, Any]]] = {worker.mode: [] for worker in workers}
    for number in range(rounds + 1):
        for worker in workers:
            tokens = command["max_tokens"] if number else min(command["max_tokens"], WARM_UP_TOKENS)
            result = worker.measure({**command, "max_tokens": tokens})
            name = f"round {number} of {rounds}" if number else "warm-up"
            ttft = max(result["ttft_ms"])
            speed = result["tokens"] / result["seconds"]
            say(f"{name}: {worker.mode}, {what}: {speed:.1f} tokens/s, first token after {ttft:.0f} ms")
            if number:
                results[worker.mode].append(result)
    return results


def measure(workers: list[Worker], options: argparse.Namespace, report: Report) -> None:
    for count in options.concurrency:
        command = {"concurrency": count, "prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
        results = alternate(workers, options.rounds, f"{count} concurrent", command)
        report.throughput += [throughput(mode, count, results[mode], options.prompt_tokens) for mode in MODES]
    for length in options.first_token:
        command = {"concurrency": 1, "prompt_tokens": length, "max_tokens": 1}
        results = alternate(workers, options.rounds, f"prompt of {length}", command)
        report.first_token += [first_token(mode, length, results[mode]) for mode in MODES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here, and the tables beside it")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG or SVG file")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs, not how fast")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the demo model)")
    parser.add_argument("--adapter", type=Path, default=ROOT / "examples" / "demo_adapter" / "adapter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64, help="prompts of the concurrent requests")
    parser.add_argument("--max-tokens", type=int, default=32, help="generated by each of them")
    parser.add_argument(
        "--first-token", type=int, nargs="+", default=[64, 512, 1500], help="prompts of single requests"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.max_tokens, options.prompt_tokens = 1, 8, 16
    if options.model is None:
        from tensorguard.models.smollm2 import prepare_smollm2

        options.model = prepare_smollm2(ROOT / ".cache" / "models", say)
    machine = f"{processor()}, {os.cpu_count()} processors, {options.dtype}, {options.model.name}, r = 16 on q, k, v, o"
    say(machine)
    kept = ("rounds", "prompt_tokens", "max_tokens")
    report = Report(machine, {name: getattr(options, name) for name in kept})
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "attestor"
        say("sealing the adapter")
        package = seal(options.model, options.adapter, state)
        try:
            workers = start_workers(options, package, state)
            measure(workers, options, report)
        finally:
            for worker in workers:
                assert worker.process.stdin is not None
                worker.process.stdin.close()
            for worker in workers:
                worker.process.wait(60)
    tables = text(report)
    print(tables)
    if options.json:
        options.json.write_text(json.dumps(report.document(), indent=1) + "\n")
        options.json.with_suffix(".txt").write_text(tables + "\n")
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
