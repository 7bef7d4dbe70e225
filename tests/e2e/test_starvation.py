"""The coprocessor dies or stalls in the middle of an answer; only the adapter's requests notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER
from tensorguard.stack.health import HealthProbe
from tensorguard.stack.process import ServiceSpec
from tests.e2e.conftest import Stack, reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
MAX_TOKENS = 64
TOKENS_BEFORE = 3
NOTICED_SECONDS = 15.0
"""Half of what a delta may take from a coprocessor that is alive; silence is noticed within 2 s on an idle machine."""


@pytest.fixture(scope="module")
def expected(stack: Stack, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of the adapter's answers to the first two prompts."""
    answers = reference(stack, prompts[:2], MAX_TOKENS, tmp_path_factory.mktemp("reference"))
    return [answer["token_ids"] for answer in answers]


def client_of(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=stack.endpoints.base_url, api_key="any", max_retries=0, timeout=300)


async def stream(
    client: openai.AsyncOpenAI, model: str, prompt: str, tokens: list[int], started: asyncio.Event
) -> None:
    """Append the answer's tokens as they arrive; `started` is set after the first few."""
    chunks: Any = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []  # the first chunk has none
        if len(tokens) >= TOKENS_BEFORE:
            started.set()


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> list[int]:
    tokens: list[int] = []
    await stream(client, model, prompt, tokens, asyncio.Event())
    return tokens


async def ask_until_back(client: openai.AsyncOpenAI, prompt: str) -> list[int]:
    deadline = time.monotonic() + 60
    while True:
        try:
            return await ask(client, DEMO_ADAPTER, prompt)
        except openai.APIError as error:
            assert error.code == "delta_unavailable" and time.monotonic() < deadline
            await asyncio.sleep(1)


async def fail_in_the_middle(stack: Stack, prompt: str, signal_number: int, pid: int) -> tuple[list[int], list[int]]:
    """Tokens of an adapter's answer that lost its coprocessor, and of a base answer beside it."""
    client, started = client_of(stack), asyncio.Event()
    adapted: list[int] = []
    private = asyncio.create_task(stream(client, DEMO_ADAPTER, prompt, adapted, started))
    plain = asyncio.create_task(ask(client, BASE_NAME, prompt))
    await asyncio.wait_for(started.wait(), 120)
    os.kill(pid, signal_number)
    with pytest.raises(openai.APIError) as caught:
        await asyncio.wait_for(private, NOTICED_SECONDS)
    assert caught.value.code == "delta_unavailable"
    return adapted, await plain


@pytest.fixture
def coprocessor(stack: Stack) -> ServiceSpec:
    (process,) = (p for p in stack.launcher.processes if p.spec.name == "he_lora")
    return process.spec


@contextlib.contextmanager
def started_again(spec: ServiceSpec, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            spec.command, env={**os.environ, **spec.environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with HealthProbe(spec) as probe:
            deadline = time.monotonic() + 120
            while not probe.healthy():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def test_a_coprocessor_that_stalls_fails_only_its_requests(
    stack: Stack, prompts: list[str], expected: list[list[int]]
) -> None:
    pid = stack.pid("he_lora")
    base = await ask(client_of(stack), BASE_NAME, prompts[0])
    try:
        adapted, plain = await fail_in_the_middle(stack, prompts[0], signal.SIGSTOP, pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert TOKENS_BEFORE <= len(adapted) < MAX_TOKENS
    # Nothing that left was computed without its delta.
    assert adapted == expected[0][: len(adapted)]
    assert plain == base
    assert await ask_until_back(client_of(stack), prompts[0]) == expected[0]


async def test_a_coprocessor_that_dies_fails_only_its_requests_and_is_found_again(
    stack: Stack, prompts: list[str], expected: list[list[int]], coprocessor: ServiceSpec, tmp_path: Path
) -> None:
    client = client_of(stack)
    base = await ask(client, BASE_NAME, prompts[1])
    adapted, plain = await fail_in_the_middle(stack, prompts[1], signal.SIGKILL, stack.pid("he_lora"))
    assert TOKENS_BEFORE <= len(adapted) < MAX_TOKENS
    assert adapted == expected[1][: len(adapted)]
    assert plain == base
    # Never the base model's answer under the adapter's name.
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(client, DEMO_ADAPTER, prompts[1])
    assert caught.value.status_code == 503 and caught.value.code == "delta_unavailable"
    assert await ask(client, BASE_NAME, prompts[1]) == base
    with started_again(coprocessor, tmp_path / "coprocessor.log"):
        assert await ask_until_back(client, prompts[1]) == expected[1]
