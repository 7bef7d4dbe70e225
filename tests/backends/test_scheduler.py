"""vLLM's real scheduler and block pool with our end of failed requests; only the model is played.

The played model keeps for every KV slot which tokens it was computed from and whether all deltas were there, so that a
step that reads anything else is noticed, whichever way the blocks got there.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tensorguard.backends.vllm import failures
from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, FailClosedScheduler, StepOutput
from tests.support.adapters import write_base_model

BLOCK = 4
WRONG = 98
"""What the played model samples where a delta was missing."""
DRAFTS = 2


def next_token(tokens: list[int]) -> int:
    return (7 * tokens[-1] + 3 * len(tokens) + sum(tokens)) % 90


def continuation(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("model"), max_position_embeddings=256, vocab_size=100)


class Played:
    """A scheduler, and a model that only remembers. Salts name adapters."""

    def __init__(
        self,
        model: Path,
        *,
        blocks: int = 100,
        budget: int = 64,
        requests: int = 8,
        speculative: bool = False,
        scheduler: type[FailClosedScheduler] = FailClosedScheduler,
    ) -> None:
        init_none_hash(sha256)
        model_config = ModelConfig(model=str(model), skip_tokenizer_init=True, max_model_len=256, dtype="float32")
        guesses: dict[str, Any] = {
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 2,
            "target_model_config": model_config,
            "target_parallel_config": ParallelConfig(),
        }
        config = VllmConfig(
            model_config=model_config,
            scheduler_config=SchedulerConfig(
                max_num_seqs=requests,
                max_num_batched_tokens=budget,
                max_model_len=256,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            speculative_config=SpeculativeConfig(**guesses) if speculative else None,
        )
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.speculative = speculative
        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.contents: dict[tuple[int, int], tuple[str, tuple[int, ...], bool]] = {}
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.received: dict[str, list[int]] = {}
        self.ended: dict[str, EngineCoreOutput] = {}
        self.computed: dict[str, int] = {}
        """Rows of a request that went through the model."""

    def add(self, name: str, prompt: list[int], salt: str = "red", tokens: int = 3) -> None:
        self.prompts[name], self.received[name], self.computed[name] = (prompt, tokens), [], 0
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self.scheduler.add_request(
            Request(name, list(prompt), parameters, None, cache_salt=salt, block_hasher=self.hasher)
        )

    def step(
        self, failing: Collection[str] = (), aborted: Collection[str] = (), reason: str = DELTA_UNAVAILABLE
    ) -> list[str]:
        """One step in which the adapters `failing` have no delta and callers of `aborted` go away. Who was in it."""
        scheduled = self.scheduler.schedule()
        in_step = {name: self.scheduler.requests[name] for name in scheduled.num_scheduled_tokens}
        failed = {name: reason for name, request in in_step.items() if request.cache_salt in failing}
        tokens = {
            name: list(request.all_token_ids) + scheduled.scheduled_spec_decode_tokens.get(name, [])
            for name, request in in_step.items()
        }
        # Every row is written before one is read: requests of one step share blocks.
        for name, request in in_step.items():
            count = scheduled.num_scheduled_tokens[name]
            self.computed[name] += count
            for place in range(request.num_computed_tokens - count, request.num_computed_tokens):
                row = (str(request.cache_salt), tuple(tokens[name][: place + 1]), name not in failed)
                self.contents[self._slot(name, place)] = row
        sampled = []
        for name, request in in_step.items():
            for place in range(request.num_computed_tokens if name not in failed else 0):
                expected = (str(request.cache_salt), tuple(tokens[name][: place + 1]), True)
                assert self.contents.get(self._slot(name, place)) == expected, "a step read what it must not"
            sampled.append(self._sample(request, tokens[name], wrong=name in failed))
        output = ModelRunnerOutput(list(in_step), {name: i for i, name in enumerate(in_step)}, sampled)
        self.scheduler.finish_requests(list(aborted), RequestStatus.FINISHED_ABORTED)
        outputs = self.scheduler.update_from_output(scheduled, StepOutput.without(output, failed) if failed else output)
        for item in (item for client in outputs.values() for item in client.outputs):
            self._receive(item)
        assert not (failed.keys() - set(aborted)) - self.ended.keys(), "a request outlived its missing delta"
        if self.speculative:
            self._guess()
        return list(in_step)

    def run(self, steps: int = 200) -> None:
        """Until nothing is left to do; then every answer is the right one."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests()

    def check(self) -> None:
        """Every answer is right as far as it got, and whole unless the request failed."""
        for name, (prompt, length) in self.prompts.items():
            expected, ended = continuation(prompt, length), self.ended.get(name)
            assert self.received[name] == expected[: len(self.received[name])]
            if ended is not None and ended.finish_reason != FinishReason.ERROR:
                assert self.received[name] == expected

    def _slot(self, name: str, place: int) -> tuple[int, int]:
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        return blocks[place // BLOCK], place % BLOCK

    def _sample(self, request: Request, tokens: list[int], *, wrong: bool) -> list[int]:
        known = request.num_tokens
        if request.num_computed_tokens < known:
            return []  # a chunk of a prompt, or of what is computed again
        if wrong:
            return [WRONG] * (1 + len(tokens) - known)
        made = [next_token(tokens[:known])]
        while known < len(tokens) and tokens[known] == made[-1]:
            known += 1
            made.append(next_token(tokens[:known]))
        return made

    def _receive(self, item: EngineCoreOutput) -> None:
        assert item.request_id not in self.ended, "a request ended twice"
        assert WRONG not in item.new_token_ids, "a token left without its delta"
        self.received[item.request_id] += item.new_token_ids
        if item.finish_reason is not None:
            self.ended[item.request_id] = item

    def _guess(self) -> None:
        running = [request for request in self.scheduler.running if not request.is_prefill_chunk]
        guesses = [continuation(list(r.all_token_ids), DRAFTS) for r in running]
        for number, guess in enumerate(guesses):
            guess[-1] += number % 2  # every other one is half wrong
        self.scheduler.update_draft_token_ids(DraftTokenIds([r.request_id for r in running], guesses))


@pytest.fixture(autouse=True)
def no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "end_with_parent", lambda: None)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(90) for _ in range(length)]


def test_a_healthy_step_is_vllms_own(model: Path) -> None:
    played = Played(model)
    played.add("a", prompt_of(10))
    played.add("b", prompt_of(10), salt="blue")
    played.run()
    played.check()
    assert {ended.finish_reason for ended in played.ended.values()} == {FinishReason.LENGTH}
    played.add("again", prompt_of(10))
    played.run()
    assert played.computed["again"] < played.computed["a"], "prefixes are reused within an adapter"


@pytest.mark.parametrize("reason", ["delta_unavailable", "lease_expired", "budget_exhausted"])
def test_only_the_adapters_requests_end_and_with_the_reason(model: Path, reason: str) -> None:
    played = Played(model)
    for salt in ("red", "blue", "base"):
        played.add(salt, prompt_of(10), salt=salt)
    played.step()
    played.step(failing={"red"}, reason=reason)
    ended = played.ended["red"]
    assert (ended.new_token_ids, ended.finish_reason, ended.stop_reason) == ([], FinishReason.ERROR, reason)
    assert len(played.received["red"]) == 1
    played.run()
    played.check()
    assert [len(played.received[name]) for name in ("blue", "base")] == [3, 3]


def again(played: Played, prompt: list[int], tokens: int = 3) -> None:
    """The same prompt with the same salt, as a request that was waiting meanwhile has it, is computed anew."""
    played.add("again", prompt, tokens=tokens)
    played.run()
    played.check()
    assert played.computed["again"] == len(prompt) + tokens - 1


def test_a_failed_prompt_is_not_reused(model: Path) -> None:
    played = Played(model)
    played.add("a", prompt_of(21))
    played.step(failing={"red"})
    again(played, prompt_of(21))


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_any_chunk_of_a_prompt_may_fail(model: Path, chunk: int) -> None:
    played = Played(model, budget=8)
    played.add("a", prompt_of(21))
    for _ in range(chunk):
        played.step()
    played.step(failing={"red"})
    assert played.ended["a"].finish_reason == FinishReason.ERROR and played.received["a"] == []
    again(played, prompt_of(21))


def test_a_failed_decode_step_that_fills_a_block_is_not_reused(model: Path) -> None:
    played, prompt = Played(model), prompt_of(7)
    played.add("a", prompt, tokens=10)
    played.step()
    played.step(failing={"red"})  # computes the eighth token, which fills the second block
    assert len(played.received["a"]) == 1
    again(played, prompt + played.received["a"])


def test_a_caller_that_goes_away_during_the_failing_step(model: Path) -> None:
    """vLLM handles aborts after the forward pass and before its output: nobody is left to be failed then."""
    played = Played(model)
    played.add("a", prompt_of(21))
    played.step(failing={"red"}, aborted={"a"})
    assert played.ended == {}
    again(played, prompt_of(21))


def test_a_caller_that_goes_away_otherwise_leaves_its_blocks(model: Path) -> None:
    played = Played(model)
    played.add("a", prompt_of(21))
    played.step(aborted={"a"})
    played.add("again", prompt_of(21))
    played.run()
    assert played.computed["again"] < 10


def test_several_choices_of_one_prompt(model: Path) -> None:
    """n > 1: children are requests of their own, and share the blocks that the first one is just writing."""
    played = Played(model, requests=2)
    for child in range(3):
        played.add(f"{child}_a", prompt_of(21))
    assert played.step(failing={"red"}) == ["0_a", "1_a"]
    assert played.computed["1_a"] < 10, "it reads the first one's blocks"
    assert set(played.ended) == {"0_a", "1_a"}
    played.run()
    played.check()
    assert played.computed["2_a"] == 21 + 2, "the third one waited, and reads nothing of theirs"


def test_beams(model: Path) -> None:
    """Beam search asks for one token at a time, each time with all tokens so far."""
    played, tokens = Played(model), prompt_of(21)
    for number in range(4):
        for beam in range(2):
            played.add(f"{number}.{beam}", [*tokens, beam], tokens=1)
        played.step(failing={"red"} if number == 1 else ())
        assert [f"{number}.{beam}" in played.ended for beam in range(2)] == [True, True]
        if number == 2:
            assert played.computed["2.0"] == len(tokens) + 1, "nothing of the failed beams is read"
        tokens = [*tokens, *continuation(tokens, 1)]
    played.check()


def two_that_do_not_fit(model: Path) -> Played:
    played = Played(model, blocks=12)
    played.add("a", prompt_of(16, 1), tokens=12)
    played.add("b", prompt_of(16, 2), tokens=12)
    return played


def steps_until_preemption(played: Played) -> int:
    """Including the one in which the second request is preempted."""
    for number in range(1, 30):
        played.step()
        if played.scheduler.requests["b"].status == RequestStatus.PREEMPTED:
            return number
    raise AssertionError("nothing was preempted")


def test_a_request_preempted_in_the_failing_step_goes_on(model: Path) -> None:
    """It was not computed in that step."""
    steps = steps_until_preemption(two_that_do_not_fit(model))
    played = two_that_do_not_fit(model)
    for _ in range(steps - 1):
        played.step()
    assert played.step(failing={"red"}) == ["a"]
    assert list(played.ended) == ["a"]
    played.run()
    played.check()
    assert len(played.received["b"]) == 12


def test_a_preempted_request_may_fail_when_it_is_computed_again(model: Path) -> None:
    played = two_that_do_not_fit(model)
    steps_until_preemption(played)
    played.step(failing={"red"})
    assert list(played.ended) == ["a"]
    tokens = list(played.received["b"])
    assert tokens and played.step(failing={"red"}) == ["b"]
    assert played.ended["b"].finish_reason == FinishReason.ERROR and played.received["b"] == tokens
    for name, seed in (("a2", 1), ("b2", 2)):
        played.add(name, prompt_of(16, seed), tokens=3)
    played.run()
    played.check()


def test_speculative_tokens_of_a_failed_step_are_dropped(model: Path) -> None:
    played, prompt = Played(model, speculative=True), prompt_of(10)
    played.add("a", prompt, tokens=20)
    played.add("b", prompt, salt="blue", tokens=20)
    played.step()
    assert played.step() == ["a", "b"]
    assert len(played.received["a"]) == 1 + DRAFTS + 1, "guesses were accepted"
    played.step(failing={"red"})
    assert len(played.received["a"]) == 1 + DRAFTS + 1
    played.add("again", prompt + played.received["a"], tokens=3)
    played.run()
    played.check()
    assert len(played.received["b"]) == 20


def storm(model: Path, seed: int, **options: Any) -> Played:
    """Requests that share beginnings, few blocks, and steps that fail and callers that leave at random."""
    generator = random.Random(seed)
    played = Played(model, blocks=30, budget=16, requests=4, **options)
    begins = [prompt_of(length, length) for length in (9, 17)]
    for number in range(60):
        for _ in range(generator.randrange(3)):
            name = f"{number}.{generator.random()}"
            prompt = generator.choice(begins) + prompt_of(generator.randrange(6), generator.randrange(3))
            played.add(name, prompt, salt=generator.choice(["red", "blue"]), tokens=generator.randrange(1, 9))
        failing = {salt for salt in ("red", "blue") if generator.random() < 0.15}
        aborted = [name for name in played.scheduler.requests if generator.random() < 0.1]
        played.step(failing, aborted)
    played.run(1000)
    played.check()
    return played


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_in_a_storm_nothing_wrong_is_read_or_leaves(model: Path, seed: int, speculative: bool) -> None:
    played = storm(model, seed, speculative=speculative)
    ended = [ending.finish_reason for ending in played.ended.values()]
    assert ended.count(FinishReason.LENGTH) > 10 and ended.count(FinishReason.ERROR) > 3


class WithoutEviction(FailClosedScheduler):
    def _blocks(self, request_id: str) -> set[int]:
        return set()


class WithoutAborts(FailClosedScheduler):
    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        if finished_status == RequestStatus.FINISHED_ABORTED:
            self._in_step = frozenset()
        return super().finish_requests(request_ids, finished_status)


@pytest.mark.parametrize("broken", [WithoutEviction, WithoutAborts])
def test_the_storm_finds_a_scheduler_that_forgets(model: Path, broken: type[FailClosedScheduler]) -> None:
    with pytest.raises(AssertionError, match="a step read what it must not"):
        for seed in range(12):
            storm(model, seed, scheduler=broken)
