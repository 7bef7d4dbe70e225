"""The whole system over separate processes: correctness, isolation of the adapter's weights, reflection."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.package import PackageKeyRegistry, open_manifest, read_adapter
from tensorguard.package.parts import decode_basis
from tests.e2e.conftest import MAX_TOKENS, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
LARGEST_GAP = 1e-2
CONCURRENT = 8


async def ask_all(stack: Stack, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the base model's and of the adapter's answers; requests of both are in flight together."""
    client = openai.AsyncOpenAI(base_url=stack.endpoints.base_url, api_key="any", max_retries=0, timeout=900)
    slots = asyncio.Semaphore(CONCURRENT)

    async def ask(model: str, prompt: str) -> list[int]:
        async with slots:
            answer: Any = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
        return list(answer.choices[0].token_ids)

    pairs = [(model, prompt) for prompt in prompts for model in (BASE_NAME, DEMO_ADAPTER)]
    answers = await asyncio.gather(*(ask(model, prompt) for model, prompt in pairs))
    return answers[0::2], answers[1::2]


async def test_mixed_requests_equal_the_plaintext_reference(
    stack: Stack, prompts: list[str], reference: list[dict[str, Any]]
) -> None:
    base, adapted = await ask_all(stack, prompts)
    assert all(len(answer) >= MAX_TOKENS for answer in adapted)
    assert sum(a != b for a, b in zip(adapted, base, strict=True)) >= 15
    for prompt, answer, expected in zip(prompts, adapted, reference, strict=True):
        if answer != expected["token_ids"]:
            first = next(i for i, (a, b) in enumerate(zip(answer, expected["token_ids"], strict=False)) if a != b)
            gap = expected["gaps"][first]
            print(f"{prompt!r} differs at token {first}, where the reference's logit gap is {gap:.2e}")
            assert gap <= LARGEST_GAP


def resident_memory(pid: int) -> bytes:
    """All readable private memory of a process."""
    parts = []
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            span, flags, _, device, *_ = line.split()
            if not flags.startswith("rw") or device != "00:00":
                continue
            start, end = (int(value, 16) for value in span.split("-"))
            try:
                memory.seek(start)
                parts.append(memory.read(end - start))
            except (OSError, ValueError, OverflowError):
                continue
    return b"".join(parts)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
async def test_no_row_of_the_weights_is_in_the_inference_host(stack: Stack, prompts: list[str]) -> None:
    await ask_all(stack, prompts[:1])
    packaged = stack.demo.packaged
    verified = open_manifest(packaged.package, [VerifyingKeys.read(path) for path in packaged.publisher_keys])
    manifest = verified.manifest
    record = PackageKeyRegistry(stack.settings.attestor_state).lookup(
        manifest.tenant, manifest.package_id, manifest.sequence, verified.digest
    )
    contents = read_adapter(packaged.package, verified, record.content_key)
    scales = [group.weights.row_scales for group in contents.groups]
    needles = []
    for group, scale in zip(contents.groups, scales, strict=True):
        row = group.weights.integers[0, :12]
        real = row * scale[0]
        for values in (row.astype(np.int16), row.astype(np.int32), row.astype(np.int64)):
            needles.append(values.tobytes())
        needles += [real.astype(kind).tobytes() for kind in (np.float16, np.float32, np.float64)]
    memory = b"".join(resident_memory(pid) for pid in family(stack.pid("inference")))
    # The basis U is meant to be there: finding it shows that the scan sees what is in memory.
    basis = next(iter(decode_basis(manifest, contents.u).values()))
    lines = (basis[0], basis[:12, 0])
    assert any(np.ascontiguousarray(line, np.float32).tobytes() in memory for line in lines)
    assert len(memory) > 100 << 20
    assert not [needle for needle in needles if needle in memory]


def grpcurl(*arguments: str) -> str:
    program = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
    assert program is not None, "grpcurl is missing: run `make setup`"
    done = subprocess.run([program, "-plaintext", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("endpoint", "service", "field"),
    [
        ("attestor", "tensafe.attestor.v1.AttestorService", "policyHash"),
        ("coprocessor", "tensafe.he_lora.v1.HeLoraService", "backend"),
        ("inference", "tensafe.inference.v1.InferenceService", "model"),
        ("gateway_admin", "tensafe.gateway.v1.GatewayService", "httpAddress"),
    ],
)
def test_grpcurl_lists_and_calls_each_service(stack: Stack, endpoint: str, service: str, field: str) -> None:
    address = getattr(stack.endpoints, endpoint)
    assert service in grpcurl(address, "list").split()
    assert field in json.loads(grpcurl(address, f"{service}/GetStatus"))
