"""Where the time of an engine step goes: decode of one and of eight sequences, and a prompt of 512 tokens.

    python benchmarks/step_trace.py [--json FILE] [--picture FILE]

A real engine with the demo adapter, an attestor and a coprocessor, each a process of its own, with clocks around their
functions (benchmarks/timeline.py). The table has medians over the recorded steps; the picture shows one layer of a
median step, on both sides, and the shares. The table goes to the file beside the picture (.txt), too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.e2e import TENANT, processor, say, seal  # noqa: E402
from benchmarks.step_report import draw, steps, table  # noqa: E402
from benchmarks.timeline import Span  # noqa: E402

SHAPES = {"decode, 1 sequence": (1, 1), "decode, 8 sequences": (8, 1), "prefill, 512 tokens": (1, 512)}
"""Requests, and rows of each, in the steps that are looked at."""
DECODE_STEPS = 8
PREFILLS = 3


async def record(options: argparse.Namespace, connection: Any, root_key: Path) -> list[Span]:
    """Start the engine, run every shape, and return the worker's spans."""
    from vllm.sampling_params import SamplingParams

    from tensorguard.backends.vllm.core import EngineCore
    from tensorguard.backends.vllm.options import EngineOptions

    engine = await EngineCore.start(
        EngineOptions(model=str(options.model), dtype=options.dtype, max_model_len=1024),
        [connection],
        require_attestation=False,
        simulated_root_key=root_key,
        worker_class="benchmarks.traced_worker.TracedWorker",
    )
    try:
        route, prompts = engine.route(connection.name), iter(range(1000))

        async def request(length: int, tokens: int) -> None:
            number = next(prompts)
            # Another first token each time, so that no prompt is in the prefix cache.
            prompt = {"prompt_token_ids": [100 + number, *range(1000, 999 + length)]}
            sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            async for _ in route.generate(prompt, sampling, f"trace-{number}"):
                pass

        async def run(requests: int, rows: int) -> None:
            await asyncio.gather(
                *(request(16, DECODE_STEPS + 1) if rows == 1 else request(rows, 1) for _ in range(requests))
            )

        for requests, rows in SHAPES.values():  # the first time warms up
            await run(requests, rows)
        await engine.llm.collective_rpc("trace_start")
        for requests, rows in SHAPES.values():
            for _ in range(1 if rows == 1 else PREFILLS):
                await run(requests, rows)
        (spans,) = await engine.llm.collective_rpc("trace_stop")
        return [Span(*span) for span in spans]
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every span here")
    parser.add_argument(
        "--picture", type=Path, help="draw the timeline into this PNG or SVG file; the table goes beside it"
    )
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the demo model)")
    parser.add_argument("--adapter", type=Path, default=ROOT / "examples" / "demo_adapter" / "adapter")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    # For the processes that import the clocks.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if options.model is None:
        from tensorguard.models.smollm2 import prepare_smollm2

        options.model = prepare_smollm2(ROOT / ".cache" / "models", say)
    layers = json.loads((options.model / "config.json").read_text())["num_hidden_layers"]
    machine = f"{processor()}, {os.cpu_count()} processors, {options.dtype}, {options.model.name}, r = 16 on q, k, v, o"
    say(machine)
    with tempfile.TemporaryDirectory() as folder:
        trace_file = Path(folder) / "coprocessor.json"
        host = serve_and_record(options, Path(folder) / "attestor", trace_file)
        coprocessor = [Span(*span) for span in json.loads(trace_file.read_text())]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "host": host, "coprocessor": coprocessor}) + "\n")
    cases = {name: steps(host, coprocessor, requests, requests * rows) for name, (requests, rows) in SHAPES.items()}
    tables = f"{machine}\n\n{table(cases)}"
    print(tables)
    if options.picture:
        draw(cases, machine, options.picture, layers)
        options.picture.with_suffix(".txt").write_text(tables + "\n")


def serve_and_record(options: argparse.Namespace, state_dir: Path, trace_file: Path) -> list[Span]:
    """Start attestor and coprocessor, record, and stop them: the coprocessor then writes its spans."""
    from tensorguard.backends.vllm.config import AdapterConnection
    from tensorguard.evidence.development import initialise_development_state
    from tensorguard.stack.embedded import local_settings
    from tensorguard.stack.launcher import Launcher
    from tensorguard.stack.packages import find_adapter
    from tensorguard.stack.services import attestor_spec, coprocessor_spec
    from tensorguard.stack.stack import EMBEDDED_PORTS, choose_ports

    package = seal(options.model, options.adapter, state_dir)
    settings = local_settings(state_dir, attestor_port=0, coprocessor_port=0)
    adapter, ports = find_adapter(package, state_dir), choose_ports(settings, EMBEDDED_PORTS)
    state = initialise_development_state(settings.attestor_state, [TENANT])
    attestor = attestor_spec(settings, ports["attestor_port"], state)
    coprocessor = coprocessor_spec(settings, ports["coprocessor_port"], state, attestor.address, [adapter])
    coprocessor = replace(
        coprocessor,
        command=(sys.executable, str(ROOT / "benchmarks" / "traced_coprocessor.py")),
        environment={**coprocessor.environment, "TRACE_FILE": str(trace_file)},
    )
    with Launcher(settings.logs) as launcher:
        launcher.start(attestor)
        launcher.start(coprocessor)
        connection = AdapterConnection(
            name=adapter.name,
            coprocessor_endpoint=coprocessor.address,
            attestor_endpoint=attestor.address,
            attestor_thumbprint=state.attestor_thumbprint,
            tenant=TENANT,
            publisher_keys=adapter.publisher_keys,
        )
        return asyncio.run(record(options, connection, state.simulated_root_key))


if __name__ == "__main__":
    main()
