"""Two ranks of a small model, with real encryption: the same answers, failures on all ranks, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tensorguard.errors import DeltaUnavailableError, NotFoundError
from tests.support.agreement import LARGEST_GAP, Agreement, Expected, greedy, greedy_all, reference_answers
from tests.support.private_adapters import PrivateAdapters, private_adapters
from tests.support.random_lora import write_random_lora
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(540), pytest.mark.asyncio(loop_scope="module")]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS, MANY = 12, 1500
PROMPTS = [[5, 17, 40, 33], [int(n) % 90 + 1 for n in range(0, 300, 2)], [70, 3, 3, 9, 21]]
FIRM = PROMPTS[0]
"""Its answer has no two logits that could change places."""


@dataclass
class Engine:
    core: Any
    private: PrivateAdapters
    folders: dict[str | None, Path | None]
    model: Path
    processes: list[psutil.Process]

    def expected(self, adapter: str | None) -> list[Expected]:
        return reference_answers(self.model, self.folders[adapter], PROMPTS, TOKENS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    from tensorguard.backends.vllm.core import EngineCore
    from tensorguard.backends.vllm.options import EngineOptions

    folder = tmp_path_factory.mktemp("parallel")
    model = write_tiny_llama(folder / "model")
    adapters = {
        "red": write_random_lora(folder / "red", model, targets=ALL, rank=8, strength=0.3, seed=1),
        # One projection of three, and a group of which one layer has none.
        "blue": write_random_lora(
            folder / "blue", model, targets=("v_proj", "o_proj"), layers=[0, 2], rank=4, strength=0.5, seed=2
        ),
        "late": write_random_lora(
            folder / "late", model, targets=("k_proj", "down_proj"), rank=4, strength=0.5, seed=3
        ),
    }
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = EngineOptions(model=str(model), dtype="float32", tensor_parallel_size=2, kv_cache_gib=0.1)
    with private_adapters(folder, model, adapters) as private:
        # Python's own helper, which stays until this process ends.
        resource_tracker.ensure_running()
        before = set(psutil.Process().children(recursive=True))
        core = await EngineCore.start(
            options,
            private.connections[:2],
            require_attestation=False,
            simulated_root_key=private.simulated_root_key,
            delta_timeout_seconds=20.0,
        )
        processes = [p for p in psutil.Process().children(recursive=True) if p not in before]
        try:
            yield Engine(core, private, {None: None, **adapters}, model, processes)
        finally:
            core.shutdown()


async def assert_equal(engine: Engine, *adapters: str | None) -> None:
    requests = [(adapter, prompt) for adapter in adapters for prompt in PROMPTS]
    answers = await greedy_all(engine.core, requests, TOKENS)
    agreement = Agreement()
    expected = [e for adapter in adapters for e in await asyncio.to_thread(engine.expected, adapter)]
    for answer, reference in zip(answers, expected, strict=True):
        agreement.add(answer, reference)
    assert agreement.holds, str(agreement)
    assert len({tuple(answer) for answer in answers}) == len(answers), "an adapter changed nothing"


async def stream(core: Any, adapter: str, prompt: list[int], tokens: list[int], started: asyncio.Event) -> None:
    """Append the tokens of a long answer as they arrive."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = SamplingParams(max_tokens=MANY, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    async for output in core.route(adapter).generate({"prompt_token_ids": prompt}, sampling, "streamed"):
        tokens += output.outputs[0].token_ids
        started.set()


async def once_it_is_back(core: Any, adapter: str, prompt: list[int]) -> list[int]:
    while True:
        with contextlib.suppress(DeltaUnavailableError):
            return await greedy(core, adapter, prompt, TOKENS)
        await asyncio.sleep(0.2)


async def test_mixed_answers_equal_plaintext_peft(engine: Engine) -> None:
    await assert_equal(engine, None, "red", "blue")


async def test_only_one_rank_has_sessions_and_all_have_hooks(engine: Engine) -> None:
    first, second = await engine.core.llm.collective_rpc("tensafe_status")
    assert [adapter["name"] for adapter in first["adapters"]] == ["red", "blue"]
    assert all(adapter["failures"] == 0 and adapter["calls"] > 0 for adapter in first["adapters"])
    assert "adapters" not in second
    assert first["hooked_layers"] == second["hooked_layers"] == 12
    assert first["calls"] == second["calls"]


async def test_an_adapter_comes_and_goes_on_all_ranks(engine: Engine) -> None:
    await engine.core.add_adapter(engine.private.connections[2])
    await assert_equal(engine, "late", None, "red")
    await engine.core.remove_adapter("late")
    with pytest.raises(NotFoundError):
        engine.core.route("late")


async def test_a_missing_delta_ends_its_requests_on_all_ranks_and_the_next_ones_find_it_again(engine: Engine) -> None:
    expected = {name: await asyncio.to_thread(engine.expected, name) for name in (None, "red")}
    red = expected["red"][PROMPTS.index(FIRM)]
    assert min(red.gaps) > LARGEST_GAP
    tokens: list[int] = []
    started = asyncio.Event()
    adapted = asyncio.create_task(stream(engine.core, "red", FIRM, tokens, started))
    await asyncio.wait_for(started.wait(), 60)
    base = asyncio.create_task(greedy(engine.core, None, PROMPTS[0], TOKENS))
    await asyncio.to_thread(engine.private.stop)
    with pytest.raises(DeltaUnavailableError):
        await adapted
    shared = min(len(tokens), TOKENS)
    assert 0 < len(tokens) < MANY and tokens[:shared] == red.token_ids[:shared]
    assert await base == expected[None][0].token_ids
    with pytest.raises(DeltaUnavailableError):
        await greedy(engine.core, "blue", PROMPTS[1], TOKENS)
    assert await greedy(engine.core, None, PROMPTS[1], TOKENS) == expected[None][1].token_ids
    await asyncio.to_thread(engine.private.start_again)
    async with asyncio.timeout(60):
        assert await once_it_is_back(engine.core, "red", FIRM) == red.token_ids


async def test_a_rank_that_dies_takes_the_engine_and_every_process_along(engine: Engine) -> None:
    (second,) = [p for p in engine.processes if "VLLM::Worker_TP1" in " ".join(p.cmdline())]
    second.kill()
    async with asyncio.timeout(60):
        while not engine.core.failed:  # noqa: ASYNC110 (vLLM offers no event)
            await asyncio.sleep(0.2)
    engine.core.shutdown()
    _, alive = await asyncio.to_thread(psutil.wait_procs, engine.processes, 60)
    assert alive == []
