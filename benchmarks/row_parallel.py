"""An input that is spread over tensor-parallel ranks: gathered and encrypted once, or encrypted in parts.

    python benchmarks/row_parallel.py [--json FILE] > reports/row_parallel.txt

o and down get their input x [T, d_in] as one part of its columns on each rank. Every rank is a process of its own here,
as in vLLM.

- `gathered`, what TenSafe does: rank 0 puts x together, sends one request, and shares z (`parallel.SharedDeltas`).
- `summed`: every rank sends a request for its own columns over a session of its own, all at the same time. Adding the
  products up is free: U times each rank's z would be part of the result that vLLM sums over the ranks anyway.

Medians in milliseconds, until all ranks have what they need; `gather` is the first step of `gathered` alone. The
coprocessor is a further process on this machine, with real attestation (simulated evidence) and real encryption.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import structlog

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.e2e import processor  # noqa: E402

HEAD, RANK = 64, 16
SHAPES = ((9, 3), (64, 2))
"""Heads and ranks: o of SmolLM2 with 576 inputs, and of a model with 4,096."""
CALLS = {1: 40, 8: 40, 64: 40, 256: 8}
"""Timed calls per number of tokens; all together stay below what one lease grants."""


@dataclass(frozen=True)
class Served:
    """An adapter on o alone, and what a rank needs to open a session for it."""

    settings: Any
    connection: Any

    def connect(self, closing: ExitStack) -> Any:
        from tensorguard.backends.vllm.connect import Connector

        connected = Connector(self.settings).connect(self.connection)
        closing.callback(connected.close)
        return connected.attachment.source


def serve(folder: Path, heads: int, running: ExitStack) -> Served:
    """Start a coprocessor for an adapter whose o has heads * HEAD inputs."""
    from tensorguard.backends.vllm.config import WorkerSettings
    from tests.support.private_adapters import private_adapters
    from tests.support.random_lora import write_random_lora
    from tests.support.tiny_llama import write_tiny_llama

    model = write_tiny_llama(folder / "model", layers=1)
    config = json.loads((model / "config.json").read_text())
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD}
    (model / "config.json").write_text(json.dumps(config | sizes))
    adapter = write_random_lora(folder / "adapter", model, rank=RANK, targets=("o_proj",))
    private = running.enter_context(private_adapters(folder, model, {"adapter": adapter}))
    settings = WorkerSettings(
        model_path=model, require_attestation=False, simulated_root_key=private.simulated_root_key
    )
    return Served(settings, private.connections[0])


def median_ms(call: Callable[[], Any], calls: int) -> float:
    call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times), 2)


def run_rank(rank: int, ranks: int, store: str, d_in: int, whole: Served, part: Served, answers: Any) -> None:
    """One rank; the first one puts a record for each number of tokens into `answers`."""
    from torch.distributed import FileStore, ProcessGroupGloo

    from tensorguard.backends.vllm.parallel import Ranks, SharedDeltas

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    group = Ranks(ProcessGroupGloo(FileStore(store, ranks), rank, ranks, timedelta(seconds=300)), rank, ranks)
    with ExitStack() as closing:
        shared = SharedDeltas(group, {(0, "o"): (d_in, RANK)}, whole.connect(closing) if group.leads else None)
        own = part.connect(closing)
        for tokens, calls in CALLS.items():
            x = np.random.default_rng(rank).standard_normal((tokens, d_in // ranks)).astype(np.float32)

            def together(work: Callable[[], Any], calls: int = calls) -> float:
                return median_ms(lambda: (work(), group.all(True)), calls)

            record = {
                "inputs": d_in,
                "ranks": ranks,
                "tokens": tokens,
                "gather_ms": together(lambda x=x: group.gather(x)),  # type: ignore[misc]
                "gathered_ms": together(lambda x=x: shared.begin(0, "o", x).wait(60)),  # type: ignore[misc]
                "summed_ms": together(lambda x=x: own.begin(0, "o", x).wait(60)),  # type: ignore[misc]
            }
            if group.leads:
                answers.put(record)
        group.all(True)


def measure(heads: int, ranks: int) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        for part in ("whole", "parts"):
            (folder / part).mkdir()
        whole, part = serve(folder / "whole", heads, running), serve(folder / "parts", heads // ranks, running)
        arguments = (ranks, str(folder / "store"), heads * HEAD, whole, part, answers)
        processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        records = [answers.get(timeout=100) for _ in CALLS]
        for process in processes:
            process.join()
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    records = [record for shape in SHAPES for record in measure(*shape)]
    print(f"{processor()}, {os.cpu_count()} processors, milliseconds\n")
    print("inputs  ranks  tokens   gather  gathered   summed")
    for r in records:
        print(f"{r['inputs']:6} {r['ranks']:6} {r['tokens']:7} ", end="")
        print(f"{r['gather_ms']:8.2f} {r['gathered_ms']:9.2f} {r['summed_ms']:8.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
