"""Batch shapes and engine modes on a tiny model, encrypted, each answer beside PEFT's. The whole matrix is in
test_matrix.py."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.support.agreement import Agreement, Expected, greedy, greedy_all, reference_answers
from tests.support.private_adapters import PrivateAdapters, private_adapters
from tests.support.random_lora import write_random_lora
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

RED, BLUE = "red", "blue"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMIT, TOKENS, CHUNK, DRAFTED = 512, 24, 64, 3
LENGTHS = (3, 20, 64, 65, 150, 300, LIMIT - TOKENS)
BLOCK, BLOCKS, GROWING = 128, 16, 8
OWNERS = (None, RED, BLUE)


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny model served by nobody yet: prompts of 3 to 488 tokens, and what PEFT answers to them."""

    model: Path
    private: PrivateAdapters
    prompts: list[list[int]]
    expected: dict[str | None, list[Expected]]

    def requests(self, count: int | None = None) -> list[tuple[str | None, list[int]]]:
        """Short and long prompts of every owner, owners mixed; or the first `count` of these, over and over."""
        requests = [(owner, prompt) for prompt in self.prompts[: len(LENGTHS)] for owner in OWNERS]
        return requests if count is None else [requests[i % len(requests)] for i in range(count)]

    def assert_equal(self, requests: list[tuple[str | None, list[int]]], answers: list[list[int]]) -> None:
        agreement = Agreement()
        for (owner, prompt), answer in zip(requests, answers, strict=True):
            assert len(answer) == TOKENS
            agreement.add(answer, self.expected[owner][self.prompts.index(prompt)])
        assert agreement.holds, agreement

    @asynccontextmanager
    async def served(self, **options: Any) -> AsyncIterator[Any]:
        from tensorguard.backends.vllm.core import EngineCore
        from tensorguard.backends.vllm.options import EngineOptions

        core = await EngineCore.start(
            EngineOptions(
                model=str(self.model), served_model_name="base", dtype="float32", max_model_len=LIMIT, **options
            ),
            self.private.connections,
            require_attestation=False,
            simulated_root_key=self.private.simulated_root_key,
        )
        try:
            yield core
        finally:
            core.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny_llama(folder / "model")
    adapters = {
        RED: write_random_lora(folder / RED, model, targets=ALL, strength=0.1, seed=1),
        BLUE: write_random_lora(
            folder / BLUE, model, rank=8, targets=("v_proj", "down_proj"), layers=(0, 2), strength=0.3, seed=2
        ),
    }
    rng = np.random.default_rng(4)
    # Behind the mixed lengths, one for the prefix cache and then some that outgrow a block while they are answered.
    lengths = (*LENGTHS, 300, *(BLOCK - 4,) * GROWING)
    prompts = [rng.integers(1, 257, length).tolist() for length in lengths]
    expected: dict[str | None, list[Expected]] = {None: reference_answers(model, None, prompts, TOKENS)}
    for name, adapter in adapters.items():
        expected[name] = reference_answers(model, adapter, prompts[: len(LENGTHS) + 1 + GROWING // 2], TOKENS)
    for answers in zip(*expected.values(), strict=False):
        assert len({tuple(answer.token_ids) for answer in answers}) == len(OWNERS), "an adapter changes nothing"
    with private_adapters(folder, model, adapters) as private:
        yield Tiny(model, private, prompts, expected)


@pytest_asyncio.fixture(scope="class", loop_scope="module")
async def small_steps(tiny: Tiny) -> AsyncIterator[Any]:
    block_bytes = BLOCK * 3 * 2 * 2 * 32 * 4  # tokens, layers, key and value, KV heads, head size, float32
    cache = BLOCKS * block_bytes / (1 << 30)
    async with tiny.served(max_num_batched_tokens=CHUNK, max_num_seqs=64, kv_cache_gib=cache) as core:
        yield core


class TestSmallSteps:
    """Steps of 64 tokens and a small KV cache."""

    @pytest.mark.parametrize("concurrent", [1, 21, 64])
    async def test_answers_do_not_depend_on_the_batch(self, tiny: Tiny, small_steps: Any, concurrent: int) -> None:
        """Prompts to the model's limit in chunks, beside tokens that are generated, base and adapters mixed."""
        requests = tiny.requests(concurrent)
        tiny.assert_equal(requests, await greedy_all(small_steps, requests, TOKENS))

    async def test_requests_that_are_preempted_are_computed_again(self, tiny: Tiny, small_steps: Any) -> None:
        growing = tiny.prompts[-GROWING:]
        half = GROWING // 2
        requests: list[tuple[str | None, list[int]]] = [(None, prompt) for prompt in growing[half:]]
        # The last to come are the first to go; steps with adapters last long enough for all to come meanwhile.
        requests += [(owner, prompt) for prompt in growing[:half] for owner in (None, RED, BLUE)]
        needed = sum(len(prompt) + TOKENS - 1 for owner, prompt in requests if owner)
        for _ in range(3):  # a busy machine may take requests in as slowly as it answers them
            before = await small_steps.status()
            tiny.assert_equal(requests, await greedy_all(small_steps, requests, TOKENS))
            if (await small_steps.status())["adapted_rows"] - before["adapted_rows"] > needed:
                return
        pytest.fail("nothing was preempted")

    async def test_several_answers_to_one_prompt(self, tiny: Tiny, small_steps: Any) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        # Two samples that are greedy all the same: vLLM takes n > 1 for sampling only.
        sampling = SamplingParams(
            n=2, temperature=1.0, top_k=1, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = tiny.prompts[1]
        async for output in small_steps.route(RED).generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex):
            answers = [list(answer.token_ids) for answer in output.outputs]
        assert len(answers) == 2
        tiny.assert_equal([(RED, prompt)] * 2, answers)

    async def test_a_prefix_is_computed_once_for_each_owner(self, tiny: Tiny, small_steps: Any) -> None:
        prompt = tiny.prompts[len(LENGTHS)]
        sent = []
        for owner in (None, RED, BLUE, RED, None, BLUE):
            before = (await small_steps.status())["adapted_rows"]
            tiny.assert_equal([(owner, prompt)], [await greedy(small_steps, owner, prompt, TOKENS)])
            sent.append((await small_steps.status())["adapted_rows"] - before)
        whole = len(prompt) + TOKENS - 1
        reused = whole - len(prompt) // BLOCK * BLOCK
        assert sent == [0, whole, whole, reused, 0, reused]


async def test_a_compiled_model_that_drafts_for_itself_answers_alike(tiny: Tiny) -> None:
    """Compiled target, and the unadapted base model as draft: for the base model, every guess is right."""
    drafts = {"speculative_model": str(tiny.model), "num_speculative_tokens": DRAFTED}
    async with tiny.served(enforce_eager=False, **drafts) as core:
        requests = tiny.requests(64)
        tiny.assert_equal(requests, await greedy_all(core, requests, TOKENS))
        before = await core.status()
        tiny.assert_equal([(None, tiny.prompts[0])], [await greedy(core, None, tiny.prompts[0], TOKENS)])
        after = await core.status()
        assert after["forward_passes"] - before["forward_passes"] == 1 + -(-(TOKENS - 1) // (DRAFTED + 1))
        assert after["hooked_layers"] == 4 * 3, "the draft is hooked"


async def test_guesses_of_ngrams_change_no_answer(tiny: Tiny) -> None:
    """The last test: it ends the coprocessor."""
    async with tiny.served(speculative_method="ngram", num_speculative_tokens=DRAFTED, prompt_lookup_min=1) as core:
        requests = tiny.requests()
        before = await core.status()
        tiny.assert_equal(requests, await greedy_all(core, requests, TOKENS))
        rows = (await core.status())["adapted_rows"] - before["adapted_rows"]
        assert rows > sum(len(prompt) + TOKENS - 1 for owner, prompt in requests if owner), "nothing was guessed"
        await a_coprocessor_that_dies(tiny, core)


async def a_coprocessor_that_dies(tiny: Tiny, core: Any) -> None:
    """Steps of several tokens end the way steps of one do: what came out is right, and nothing of the failed step."""
    from vllm.sampling_params import SamplingParams

    from tensorguard.errors import DeltaUnavailableError

    base = asyncio.create_task(greedy(core, None, tiny.prompts[0], TOKENS))
    seen: list[int] = []
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with pytest.raises(DeltaUnavailableError):
        async for output in core.route(RED).generate({"prompt_token_ids": tiny.prompts[0]}, sampling, uuid.uuid4().hex):
            if not seen:
                await asyncio.to_thread(tiny.private.coprocessor.server.stop, 0)
            seen = list(output.outputs[0].token_ids)
    assert 0 < len(seen) < TOKENS
    assert seen == tiny.expected[RED][0].token_ids[: len(seen)]
    tiny.assert_equal([(None, tiny.prompts[0])], [await base])
