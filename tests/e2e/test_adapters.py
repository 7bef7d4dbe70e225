"""Many adapters in one engine: mixed in a step, attached, replaced and detached while requests run.

Attestor, coprocessors and encryption are real; the base model is tiny, so that what is tested here is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.he_lora.leases import LeaseKeeper
from services.he_lora.metering import TokenMeter
from services.he_lora.server import Coprocessor
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import (
    BaseModelMismatchError,
    BudgetExhaustedError,
    InvalidInputError,
    LeaseExpiredError,
    NotFoundError,
    PackageError,
    TenSafeError,
    UnavailableError,
)
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.models.reference import ReferenceAnswer, ReferenceModel
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import TENANT, running_attestor, start_coprocessor
from tests.support.letter_llama import write_letter_llama
from tests.support.random_lora import write_random_lora

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

LARGEST_GAP = 1e-2
BLOCK = 128
PROMPTS = ["The capital of France is", "Explain homomorphic encryption:"]
TOKENS = 24

RED, GREEN, BLUE, RED_2, FOREIGN = "red", "green", "blue", "red-2", "foreign"
"""Folders; the second release of red has the package id of the first."""
ADAPTERS: dict[str, dict[str, Any]] = {
    RED: {"rank": 4, "targets": ("q_proj", "v_proj")},
    GREEN: {"rank": 16, "targets": ("o_proj", "down_proj")},
    BLUE: {"rank": 8, "targets": ("k_proj", "gate_proj", "up_proj"), "layers": [1]},
    RED_2: {"rank": 12, "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    FOREIGN: {"rank": 4, "targets": ("q_proj",)},
}


@dataclass
class World:
    """One attestor; red and green on one coprocessor, blue, the next red and one for another model on another."""

    folder: Path
    state: DevelopmentState
    attestor: str
    coprocessors: list[Coprocessor]
    references: dict[str | None, ReferenceModel]

    def connection(self, name: str, coprocessor: int, **changes: Any) -> AdapterConnection:
        return AdapterConnection(
            name=name,
            coprocessor_endpoint=self.coprocessors[coprocessor].server.address,
            attestor_endpoint=self.attestor,
            attestor_thumbprint=self.state.attestor_thumbprint,
            tenant=TENANT,
            publisher_keys=(self.folder / "publisher.pem",),
            **changes,
        )

    def sessions(self, coprocessor: int) -> int:
        return len(self.coprocessors[coprocessor].servicer._registry)

    async def expect(self, adapter: str | None, prompt: str, answer: list[int]) -> None:
        """The answer is plaintext LoRA's, up to choices that hang by a hair."""
        reference = await asyncio.to_thread(self._reference, adapter, prompt, len(answer))
        if answer != reference.token_ids:
            pairs = enumerate(zip(answer, reference.token_ids, strict=True))
            first = next(i for i, (a, b) in pairs if a != b)
            gap = reference.gaps[first]
            print(f"{adapter} {prompt[:20]!r} differs at token {first}, where the logit gap is {gap:.2e}")
            assert gap <= LARGEST_GAP, (adapter, prompt[:20], first)

    def _reference(self, adapter: str | None, prompt: str, tokens: int) -> ReferenceAnswer:
        return self.references[adapter].answer({"prompt": prompt}, tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    model, other = write_letter_llama(folder / "model"), write_letter_llama(folder / "other", seed=8)
    state = initialise_development_state(folder / "state", TENANT)
    publisher = SigningKeys.generate()
    (folder / "publisher.pem").write_bytes(publisher.public.to_pem())
    references: dict[str | None, ReferenceModel] = {None: ReferenceModel(model)}

    def pack(seed: int, name: str) -> Path:
        base = other if name == FOREIGN else model
        adapter = write_random_lora(folder / name, base, strength=0.3, seed=seed, **ADAPTERS[name])
        references[name] = ReferenceModel(base, adapter)
        package = folder / f"{name}.tssp"
        pack_adapter(
            adapter,
            package,
            base_model_dir=base,
            tenant=TENANT,
            package_id=name.removesuffix("-2"),
            sequence=2 if name == RED_2 else 1,
            signing_keys=publisher,
            key_registrar=AttestorState.open(state.state_dir).packages.register,
        )
        return package

    with running_attestor(state) as attestor, contextlib.ExitStack() as stack:
        coprocessors = []
        # Of a package whose next release is registered no key is given out any more: the old one must be open by then.
        for names in ((RED, GREEN), (BLUE, RED_2, FOREIGN)):
            packages = [pack(seed, name) for seed, name in enumerate(names)]
            _, coprocessor = start_coprocessor(state, attestor, packages, [folder / "publisher.pem"])
            stack.callback(coprocessor.close)
            stack.callback(coprocessor.server.stop, 0)
            coprocessors.append(coprocessor)
        yield World(folder, state, attestor, coprocessors, references)


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def core(world: World, environment: None) -> AsyncIterator[Any]:
    from tensorguard.backends.vllm.core import EngineCore

    started = await EngineCore.start(
        EngineOptions(model=str(world.folder / "model"), served_model_name="base", dtype="float32", kv_cache_gib=0.25),
        [world.connection(RED, 0), world.connection(GREEN, 0)],
        require_attestation=False,
        simulated_root_key=world.state.simulated_root_key,
    )
    yield started
    started.shutdown()


class Answer:
    """A greedy answer on its way; `started` is set with its first token."""

    def __init__(self, core: Any, adapter: str | None, prompt: str, tokens: int = TOKENS) -> None:
        self.tokens: list[int] = []
        self.cached: int | None = None
        self.started = asyncio.Event()
        self._route = core.route(adapter)  # the release is chosen here
        self._task = asyncio.create_task(self._read(prompt, tokens))

    async def _read(self, prompt: str, tokens: int) -> list[int]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async for output in self._route.generate({"prompt": prompt}, parameters, f"request-{id(self)}"):
            self.tokens += output.outputs[0].token_ids
            self.cached = output.num_cached_tokens if self.cached is None else self.cached
            self.started.set()
        return self.tokens

    def __await__(self) -> Any:
        return self._task.__await__()


async def keys(core: Any) -> list[str]:
    return sorted(adapter["key"] for adapter in (await core.status())["adapters"])


async def until(condition: Any, seconds: float = 30) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.1)


async def test_three_adapters_on_two_coprocessors_and_the_base_share_steps(core: Any, world: World) -> None:
    await core.add_adapter(world.connection(BLUE, 1))
    assert list(core.adapters) == [RED, GREEN, BLUE]
    before = (await core.status())["forward_passes"]
    names = (None, RED, GREEN, BLUE)
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    answers = await asyncio.gather(*(Answer(core, name, prompt) for name, prompt in asked))
    passes = (await core.status())["forward_passes"] - before
    assert passes < 2 * TOKENS, f"{passes} steps for {len(asked)} answers of {TOKENS} tokens are not shared"
    for (name, prompt), answer in zip(asked, answers, strict=True):
        await world.expect(name, prompt, answer)
    for start in range(0, len(asked), len(names)):
        assert len({tuple(answer) for answer in answers[start : start + len(names)]}) == len(names)


REFUSALS: dict[str, tuple[str, int, dict[str, Any], type[TenSafeError], str]] = {
    "another release": (RED, 1, {"expected_digest": "ab" * 32}, PackageError, "another release"),
    "another base model": (FOREIGN, 1, {}, BaseModelMismatchError, "weights"),
    "not there": (BLUE, 0, {}, NotFoundError, "not served here"),
    "attached already": (RED, 0, {}, InvalidInputError, "attached already"),
    "no coprocessor": (RED, 0, {"coprocessor_endpoint": "127.0.0.1:1"}, UnavailableError, "127.0.0.1:1"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refused_adapter_leaves_everything_as_it_was(core: Any, world: World, case: str) -> None:
    name, coprocessor, changes, error, text = REFUSALS[case]
    attached, served = await keys(core), dict(core.adapters)
    sessions = [world.sessions(number) for number in (0, 1)]
    with pytest.raises(error, match=text):
        await core.add_adapter(world.connection(name, coprocessor).model_copy(update=changes))
    assert (await keys(core), dict(core.adapters)) == (attached, served)

    async def closed() -> bool:
        return [world.sessions(number) for number in (0, 1)] == sessions

    await until(closed)
    await world.expect(RED, PROMPTS[0], await Answer(core, RED, PROMPTS[0]))


async def test_blocks_are_reused_within_a_release_and_nowhere_else(core: Any, world: World) -> None:
    """Prompts longer than two blocks. Whoever got another one's blocks would also answer wrongly."""
    prompt = "A story about a lighthouse keeper and the sea. " * 7
    assert len(prompt) > 2 * BLOCK
    for cached in (0, 2 * BLOCK):
        for name in (None, RED, GREEN):
            answer = Answer(core, name, prompt, 8)
            await world.expect(name, prompt, await answer)
            assert answer.cached == cached, name


async def test_a_release_is_replaced_while_requests_run_on_it(core: Any, world: World) -> None:
    prompt = "A list of birds that live near the river in spring. " * 6
    old = core.adapters[RED]
    long = [Answer(core, RED, text, tokens) for text, tokens in ((PROMPTS[0], 800), (prompt, 600))]
    sessions = world.sessions(0)
    await asyncio.gather(*(answer.started.wait() for answer in long))
    new = await core.add_adapter(world.connection(RED, 1))
    assert (old.sequence, new.sequence, core.adapters[RED]) == (1, 2, new)
    assert old.in_flight == 2, "the requests ended before their release was replaced"
    assert {old.key, new.key} < set(await keys(core))
    fresh = Answer(core, RED, PROMPTS[0])
    later = Answer(core, RED, prompt, 8)  # begins as one that ran on the old release
    await world.expect(RED_2, PROMPTS[0], await fresh)
    await world.expect(RED_2, prompt, await later)
    assert later.cached == 0
    for answer, text in zip(long, (PROMPTS[0], prompt), strict=True):
        await world.expect(RED, text, await answer)

    async def detached() -> bool:
        return old.key not in await keys(core) and world.sessions(0) == sessions - 1

    await until(detached)
    again = Answer(core, RED, prompt, 8)
    await world.expect(RED_2, prompt, await again)
    assert again.cached == 2 * BLOCK


async def test_removing_ends_after_the_requests_that_run(core: Any, world: World) -> None:
    running = Answer(core, GREEN, PROMPTS[1], 300)
    await running.started.wait()
    removing = asyncio.create_task(core.remove_adapter(GREEN))
    await asyncio.sleep(0)
    with pytest.raises(NotFoundError, match=GREEN):
        core.route(GREEN)
    assert not removing.done()
    await world.expect(GREEN, PROMPTS[1], await running)
    await removing
    assert not [key for key in await keys(core) if key.startswith(f"{GREEN}@")]

    async def closed() -> bool:  # the keys are gone on both sides
        return world.sessions(0) == 0

    await until(closed)
    await core.add_adapter(world.connection(GREEN, 0))
    await world.expect(GREEN, PROMPTS[1], await Answer(core, GREEN, PROMPTS[1]))


def spend(meter: TokenMeter) -> None:
    meter.renewed(dataclasses.replace(meter.terms, tokens_granted=meter.used))


@pytest.mark.parametrize(("refuse", "error"), [(TokenMeter.end, LeaseExpiredError), (spend, BudgetExhaustedError)])
async def test_a_refusal_in_the_middle_ends_only_the_adapters_requests(
    core: Any,
    world: World,
    refuse: Callable[[TokenMeter], None],
    error: type[TenSafeError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the coprocessor gets a new lease, and the session, which never broke, serves on."""
    sessions = [world.sessions(number) for number in (0, 1)]
    ended = [Answer(core, GREEN, prompt, 800) for prompt in PROMPTS]
    beside = [Answer(core, name, PROMPTS[0], 200) for name in (RED, None)]
    await asyncio.gather(*(answer.started.wait() for answer in (*ended, *beside)))
    monkeypatch.setattr(LeaseKeeper, "_renew", lambda self, adapter, more: False)
    monkeypatch.setattr(LeaseKeeper, "_reopen", lambda self: 0.1)
    refuse(world.coprocessors[0].servicer._store.get(GREEN).meter)
    for answer, prompt in zip(ended, PROMPTS, strict=True):
        with pytest.raises(error):
            await answer
        assert 0 < len(answer.tokens) < 800
        await world.expect(GREEN, prompt, answer.tokens)
    with pytest.raises(error):
        await Answer(core, GREEN, PROMPTS[0])
    await world.expect(RED_2, PROMPTS[0], await beside[0])
    await world.expect(None, PROMPTS[0], await beside[1])
    monkeypatch.undo()

    async def served() -> bool:
        with contextlib.suppress(error):
            await world.expect(GREEN, PROMPTS[1], await Answer(core, GREEN, PROMPTS[1]))
            return True
        return False

    await until(served)
    assert [world.sessions(number) for number in (0, 1)] == sessions
