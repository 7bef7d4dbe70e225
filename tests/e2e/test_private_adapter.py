"""The whole system over separate processes: correctness, isolation of the adapter's weights, reflection."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
from safetensors.numpy import load_file

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.package import open_manifest, read_adapter
from tensorguard.package.parts import decode_basis
from tensorguard.store.state import AttestorState
from tests.e2e.conftest import Stack, reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
LARGEST_GAP = 1e-2
CONCURRENT = 8


async def ask_all(stack: Stack, prompts: list[str], max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the base model's and of the adapter's answers; requests of both are in flight together."""
    client = openai.AsyncOpenAI(base_url=stack.endpoints.base_url, api_key="any", max_retries=0, timeout=900)
    slots = asyncio.Semaphore(CONCURRENT)

    async def ask(model: str, prompt: str) -> list[int]:
        async with slots:
            answer: Any = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=max_tokens,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
        return list(answer.choices[0].token_ids)

    pairs = [(model, prompt) for prompt in prompts for model in (BASE_NAME, DEMO_ADAPTER)]
    answers = await asyncio.gather(*(ask(model, prompt) for model, prompt in pairs))
    return answers[0::2], answers[1::2]


@pytest.mark.parametrize(("count", "max_tokens"), [(6, 32), pytest.param(20, 64, marks=pytest.mark.slow)])
async def test_mixed_requests_equal_the_plaintext_reference(
    stack: Stack, prompts: list[str], count: int, max_tokens: int, tmp_path: Path
) -> None:
    asked = prompts[:count]
    base, adapted = await ask_all(stack, asked, max_tokens)
    assert all(len(answer) >= max_tokens for answer in adapted)
    assert sum(a != b for a, b in zip(adapted, base, strict=True)) >= 3 * count // 4
    for prompt, answer, expected in zip(asked, adapted, reference(stack, asked, max_tokens, tmp_path), strict=True):
        if answer != expected["token_ids"]:
            first = next(i for i, (a, b) in enumerate(zip(answer, expected["token_ids"], strict=False)) if a != b)
            gap = expected["gaps"][first]
            print(f"{prompt!r} differs at token {first}, where the reference's logit gap is {gap:.2e}")
            assert gap <= LARGEST_GAP


def resident_memory(pid: int) -> Iterator[bytes]:
    """Every readable private region of a process."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            span, flags, _, device, *_ = line.split()
            if not flags.startswith("rw") or device != "00:00":
                continue
            start, end = (int(value, 16) for value in span.split("-"))
            try:
                memory.seek(start)
                yield memory.read(end - start)
            except (OSError, ValueError, OverflowError):
                continue


class Scan:
    """Looks for many byte strings of two-byte numbers or wider at once.

    Each is looked for by its rarest-looking four bytes (two 16-bit words, neither 0 nor -1 if there are such), which a
    table of 65,536 entries finds in one pass over the memory.
    """

    def __init__(self, needles: list[bytes]) -> None:
        self._anchors: dict[int, list[tuple[int, bytes]]] = {}
        self._first = np.zeros(1 << 16, bool)
        for needle in needles:
            words = np.frombuffer(needle, "<u2")
            common = np.isin(words, (0, 0xFFFF))
            at = int(np.argmin(common[:-1].astype(int) * 2 + common[1:]))
            anchor = int(words[at]) | int(words[at + 1]) << 16
            self._anchors.setdefault(anchor, []).append((2 * at, needle))
            self._first[words[at]] = True
        self._whole = np.array(sorted(self._anchors), np.uint32)

    def found(self, memory: bytes) -> set[bytes]:
        words = np.frombuffer(memory, "<u2", len(memory) // 2)
        places = np.flatnonzero(self._first[words[:-1]])
        values = words[places] | words[places + 1].astype(np.uint32) << np.uint32(16)
        places = places[np.isin(values, self._whole)]
        result = set()
        for place in places.tolist():
            for offset, needle in self._anchors[int.from_bytes(memory[2 * place : 2 * place + 4], "little")]:
                start = 2 * place - offset
                if memory[start : start + len(needle)] == needle:
                    result.add(needle)
        return result


def representations(row: npt.NDArray[np.floating[Any]]) -> list[bytes]:
    """A row of real numbers in every width somebody might hold it in; bfloat16 by truncation and by rounding."""
    single = row.astype(np.float32).view(np.uint32)
    rounded = single + np.uint32(0x7FFF) + (single >> np.uint32(16) & np.uint32(1))
    halves = [(bits >> np.uint32(16)).astype(np.uint16).tobytes() for bits in (single, rounded)]
    return [row.astype(kind).tobytes() for kind in (np.float16, np.float32, np.float64)] + halves


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
    await ask_all(stack, prompts[:1], 16)
    packaged = stack.demo.packaged
    verified = open_manifest(packaged.package, [VerifyingKeys.read(path) for path in packaged.publisher_keys])
    manifest = verified.manifest
    record = AttestorState.open(stack.settings.attestor_state).packages.lookup(
        manifest.tenant, manifest.package_id, manifest.sequence, verified.digest
    )
    contents = read_adapter(packaged.package, verified, record.content_key)
    secret: list[bytes] = []
    for group in contents.groups:
        integers = group.weights.integers[:, :12]
        for row, scale in zip(integers, group.weights.row_scales, strict=True):
            secret += [row.astype(kind).tobytes() for kind in (np.int16, np.int32, np.int64)]
            secret += representations(row * scale)
    for name, tensor in load_file(stack.demo.adapter / "adapter_model.safetensors").items():
        if "lora_A" in name:
            secret += [needle for row in tensor for needle in representations(row[:12])]
    # The basis U is meant to be there: finding it shows that the scan sees what is in memory.
    basis = next(iter(decode_basis(manifest, contents.u).values()))
    public = [np.ascontiguousarray(line, np.float32).tobytes() for line in (basis[0], basis[:12, 0])]
    scan, found, size = Scan(secret + public), set(), 0
    for pid in family(stack.pid("inference")):
        for region in resident_memory(pid):
            found |= scan.found(region)
            size += len(region)
    assert size > 100 << 20 and found & set(public)
    assert not found & set(secret)


def grpcurl(*arguments: str) -> str:
    program = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
    assert program is not None, "grpcurl is missing: run `make setup`"
    done = subprocess.run([program, "-plaintext", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("endpoint", "service", "field"),
    [
        ("attestor", "tensafe.attestor.v1.AttestorService", "policy_hash"),
        ("coprocessor", "tensafe.he_lora.v1.HeLoraService", "backend"),
        ("inference", "tensafe.inference.v1.InferenceService", "model"),
        ("gateway_admin", "tensafe.gateway.v1.GatewayService", "http_address"),
    ],
)
def test_grpcurl_lists_and_calls_each_service(stack: Stack, endpoint: str, service: str, field: str) -> None:
    address = getattr(stack.endpoints, endpoint)
    assert service in grpcurl(address, "list").split()
    assert field in json.loads(grpcurl(address, f"{service}/GetStatus"))
