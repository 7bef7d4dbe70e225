"""One vLLM engine in a process of its own, driven over standard input and output by benchmarks/e2e.py.

Modes: `base` (vLLM as it is), `plain_lora` (vLLM's own LoRA, adapter in plaintext in this process), `he_lora`
(TenSafeAsyncEngine: the adapter is in the coprocessor only). Commands are JSON lines; so are the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Engine(Protocol):
    """What the measurement needs of an engine."""

    def generate(self, token_ids: list[int], sampling: Any, request_id: str) -> AsyncIterator[Any]: ...

    async def he_totals(self) -> dict[str, float]: ...

    async def stop(self) -> None: ...


@dataclass
class PlainEngine:
    """vLLM, with or without its own LoRA."""

    llm: Any
    lora: Any

    def generate(self, token_ids: list[int], sampling: Any, request_id: str) -> AsyncIterator[Any]:
        prompt = {"prompt_token_ids": token_ids}
        stream: AsyncIterator[Any] = self.llm.generate(prompt, sampling, request_id, lora_request=self.lora)
        return stream

    async def he_totals(self) -> dict[str, float]:
        return {}

    async def stop(self) -> None:
        self.llm.shutdown()


@dataclass
class PrivateEngine:
    """TenSafe's engine with its embedded services."""

    engine: Any
    route: Any

    def generate(self, token_ids: list[int], sampling: Any, request_id: str) -> AsyncIterator[Any]:
        stream: AsyncIterator[Any] = self.route.generate({"prompt_token_ids": token_ids}, sampling, request_id)
        return stream

    async def he_totals(self) -> dict[str, float]:
        status = await self.engine.status()
        (adapter,) = status["adapters"]
        numbers = {name: value for name, value in adapter.items() if isinstance(value, (int, float))}
        return {**numbers, "hook_seconds": status["hook_seconds"], "base_seconds": status["base_seconds"]}

    async def stop(self) -> None:
        await self.engine.shutdown()


async def start(options: argparse.Namespace) -> Engine:
    if options.mode == "he_lora":
        from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig

        config = TenSafeVLLMConfig(
            model=options.model,
            tssp_package_path=options.package,
            enable_he_lora=True,
            require_attestation=False,
            state_dir=options.state_dir,
            dtype=options.dtype,
            max_model_len=2048,
        )
        engine = TenSafeAsyncEngine(config)
        core = await engine.start()
        return PrivateEngine(engine, core.route(next(iter(core.adapters))))
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    lora = options.mode == "plain_lora"
    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": 2048,
        "enforce_eager": True,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": 1 << 30,
    }
    if lora:
        arguments |= {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    request = LoRARequest("demo", 1, options.adapter) if lora else None
    return PlainEngine(llm, request)


async def measure(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Generate for `concurrency` prompts of random tokens at once; prompts never repeat, so no cache helps."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    # Statistical generator: test data, not a secret.
    generator = random.Random(command["seed"])
    count, length, tokens = command["concurrency"], command["prompt_tokens"], command["max_tokens"]
    prompts = [[generator.randrange(100, 40_000) for _ in range(length)] for _ in range(count)]
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def one(index: int) -> tuple[int, float]:
        begun, first, produced = time.perf_counter(), 0.0, 0
        async for output in engine.generate(prompts[index], sampling, f"{command['seed']}-{index}"):
            first = first or time.perf_counter() - begun
            produced += len(output.outputs[0].token_ids)
        return produced, first

    before = await engine.he_totals()
    begun = time.perf_counter()
    results = await asyncio.gather(*(one(index) for index in range(count)))
    seconds = time.perf_counter() - begun
    after = await engine.he_totals()
    return {
        "seconds": seconds,
        "tokens": sum(produced for produced, _ in results),
        "ttft_ms": [1000 * first for _, first in results],
        "he": {name: after[name] - before.get(name, 0) for name in after},
    }


async def serve(options: argparse.Namespace, answers: Any) -> None:
    engine = await start(options)
    try:
        answers.write(json.dumps({"ready": True}) + "\n")
        answers.flush()
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers.write(json.dumps(await measure(engine, json.loads(line))) + "\n")
            answers.flush()
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("base", "plain_lora", "he_lora"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--package")
    parser.add_argument("--state-dir")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    # vLLM prints to standard output; the answers go to a copy of it that nobody else has.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(serve(options, answers))


if __name__ == "__main__":
    main()
