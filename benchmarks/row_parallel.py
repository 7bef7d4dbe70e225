"""An input that is spread over tensor-parallel ranks: gathered and encrypted once, or encrypted in parts.

    python benchmarks/row_parallel.py [--json FILE] [--ranks 3]

o and down get their input x [T, d_in] as one part of its columns on each rank. `gathered` puts x together on rank 0
(gloo, between processes) and sends one request. `summed` sends one request of d_in / ranks columns for each rank, over
a session of its own, all in flight together, and leaves out whatever adding the products up would cost. Medians in
milliseconds; the coprocessor runs on this machine, with real attestation (simulated evidence) and real encryption.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HEADS, HEAD = 9, 64  # SmolLM2's o_proj: 576 inputs
RANK, TOKENS, CALLS = 16, (1, 8, 64), 60


def median_ms(call: Callable[[], Any], calls: int) -> float:
    call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times), 3)


def gather_times(rank: int, ranks: int, store: str, answers: Any) -> None:
    """Milliseconds per number of tokens that `Ranks.gather` takes, measured on rank 0 of separate processes."""
    from torch.distributed import FileStore, ProcessGroupGloo

    from tensorguard.backends.vllm.parallel import Ranks

    group = Ranks(ProcessGroupGloo(FileStore(store, ranks), rank, ranks, timedelta(seconds=120)), rank, ranks)
    result = {}
    for tokens in TOKENS:
        part = np.zeros((tokens, HEADS * HEAD // ranks), np.float32)
        result[tokens] = median_ms(lambda part=part: (group.gather(part), group.all(True)), CALLS)  # type: ignore[misc]
    if rank == 0:
        answers.put(result)


def measure_gather(ranks: int, folder: Path) -> dict[int, float]:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    arguments = (ranks, str(folder / "store"), answers)
    processes = [context.Process(target=gather_times, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    result: dict[int, float] = answers.get(timeout=300)
    for process in processes:
        process.join()
    return result


def measure_requests(folder: Path, heads: int, sessions: int) -> dict[int, float]:
    """Milliseconds from `begin` on all sessions to the last answer, per number of tokens."""
    from tensorguard.backends.vllm.config import WorkerSettings
    from tensorguard.backends.vllm.connect import Connector
    from tests.support.private_adapters import private_adapters
    from tests.support.random_lora import write_random_lora
    from tests.support.tiny_llama import write_tiny_llama

    model = write_tiny_llama(folder / "model", layers=1)
    config = json.loads((model / "config.json").read_text())
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD, "hidden_size": HEADS * HEAD}
    (model / "config.json").write_text(json.dumps(config | sizes))
    adapter = write_random_lora(folder / "adapter", model, rank=RANK, targets=("o_proj",))
    with private_adapters(folder, model, {"adapter": adapter}) as private, ExitStack() as closing:
        settings = WorkerSettings(
            model_path=model, require_attestation=False, simulated_root_key=private.simulated_root_key
        )
        connected = [Connector(settings).connect(private.connections[0]) for _ in range(sessions)]
        for each in connected:
            closing.callback(each.close)
        sources = [each.attachment.source for each in connected]

        def call(x: Any) -> None:
            for pending in [source.begin(0, "o", x) for source in sources]:
                pending.wait(60)

        rng = np.random.default_rng(0)
        inputs = {tokens: rng.standard_normal((tokens, heads * HEAD)).astype(np.float32) for tokens in TOKENS}
        return {tokens: median_ms(lambda x=x: call(x), CALLS) for tokens, x in inputs.items()}  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(3, 9), default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("whole", "parts"):
            (folder / part).mkdir()
        gather = measure_gather(options.ranks, folder)
        whole = measure_requests(folder / "whole", HEADS, 1)
        parts = measure_requests(folder / "parts", HEADS // options.ranks, options.ranks)
    print("tokens  gather   one request   gathered   summed")
    records = []
    for tokens in TOKENS:
        gathered = gather[tokens] + whole[tokens]
        records.append({"tokens": tokens, "ranks": options.ranks, "gathered_ms": gathered, "summed_ms": parts[tokens]})
        print(f"{tokens:6} {gather[tokens]:7.3f} {whole[tokens]:13.3f} {gathered:10.3f} {parts[tokens]:8.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
