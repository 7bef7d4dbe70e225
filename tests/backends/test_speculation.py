"""Steps of several tokens: what a missing delta does to accepted tokens and to guesses, in vLLM's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tensorguard.backends.vllm import failures
from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, FailClosedScheduler, StepOutput
from tests.support.tiny_llama import write_tiny_llama

GUESSED, BLOCK = 3, 16
PROMPT = list(range(1, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scheduler(model: Path, monkeypatch: pytest.MonkeyPatch) -> FailClosedScheduler:
    monkeypatch.setattr(failures, "exit_with_parent", lambda: None)
    described = ModelConfig(model=str(model), dtype="float32", max_model_len=256)
    config = VllmConfig(
        model_config=described,
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=256,
            max_model_len=256,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig(device="cpu"),
        speculative_config=SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=GUESSED,
            target_model_config=described,
            target_parallel_config=ParallelConfig(),
        ),
    )
    config.cache_config.num_gpu_blocks = 64
    layers = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=64,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], layers)],
    )
    return FailClosedScheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK)


def add(scheduler: FailClosedScheduler, name: str) -> Request:
    init_none_hash(sha256)
    sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    sampling.update_from_generation_config({}, 0)
    request = Request(name, PROMPT, sampling, None, block_hasher=get_request_block_hasher(BLOCK, sha256))
    scheduler.add_request(request)
    return request


def step(
    scheduler: FailClosedScheduler, tokens: dict[str, list[int]], failed: tuple[str, ...] = ()
) -> tuple[SchedulerOutput, dict[str, Any]]:
    """One step in which requests get `tokens` (after the prompt, guesses accepted), and what users get of it."""
    planned = scheduler.schedule()
    names = list(planned.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[list(tokens[name]) for name in names],
    )
    if failed:
        output = StepOutput.without(output, dict.fromkeys(failed, DELTA_UNAVAILABLE))
    emitted = scheduler.update_from_output(planned, output)
    return planned, {o.request_id: o for client in emitted.values() for o in client.outputs}


def guess(scheduler: FailClosedScheduler, *names: str) -> None:
    scheduler.update_draft_token_ids(DraftTokenIds(list(names), [[101, 102, 103] for _ in names]))


def test_a_failed_step_of_several_tokens_leaves_none_of_them(scheduler: FailClosedScheduler) -> None:
    good, bad = add(scheduler, "good"), add(scheduler, "bad")
    step(scheduler, {"good": [100], "bad": [100]})
    guess(scheduler, "good", "bad")
    blocks = scheduler.kv_cache_manager.get_block_ids("bad")[0]

    # All guesses of both would be accepted.
    tokens = {"good": [101, 102, 103, 104], "bad": [101, 102, 103, 104]}
    planned, emitted = step(scheduler, tokens, failed=("bad",))
    assert planned.num_scheduled_tokens == {"good": GUESSED + 1, "bad": GUESSED + 1}
    assert (emitted["good"].new_token_ids, good.num_computed_tokens) == (tokens["good"], len(PROMPT) + GUESSED + 1)
    assert (emitted["bad"].new_token_ids, emitted["bad"].finish_reason) == ([], FinishReason.ERROR)
    assert emitted["bad"].stop_reason == DELTA_UNAVAILABLE
    assert list(bad.output_token_ids) == [100]
    assert all(scheduler.kv_cache_manager.block_pool.blocks[block].block_hash is None for block in blocks)

    # The runner guesses for every request of the step, before it learns that one has ended.
    guess(scheduler, "good", "bad")
    planned, _ = step(scheduler, {"good": [9]})
    assert planned.finished_req_ids == {"bad"}
    assert planned.scheduled_spec_decode_tokens == {"good": [101, 102, 103]}
    assert good.num_computed_tokens == len(PROMPT) + GUESSED + 2, "rejected guesses were taken for computed"


def test_blocks_of_a_failed_prompt_are_not_found_again(scheduler: FailClosedScheduler) -> None:
    add(scheduler, "bad")
    _, emitted = step(scheduler, {"bad": [100]}, failed=("bad",))
    assert emitted["bad"].finish_reason == FinishReason.ERROR
    add(scheduler, "next")
    planned, _ = step(scheduler, {"next": [100]})
    assert planned.num_scheduled_tokens == {"next": len(PROMPT)}
    add(scheduler, "same")
    planned, _ = step(scheduler, {"next": [5], "same": [100]})
    assert planned.num_scheduled_tokens == {"next": 1, "same": len(PROMPT) - len(PROMPT) // BLOCK * BLOCK}
