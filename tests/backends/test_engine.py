"""`TenSafeAsyncEngine` as a script uses it: embedded services, real encryption, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tensorguard.models.reference import ReferenceAnswer, ReferenceModel
from tests.support.letter_llama import write_letter_llama
from tests.support.random_lora import write_random_lora

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Explain Homomorphic Encryption:"
MESSAGES = [{"role": "user", "content": "Name a colour."}]
LAYERS = 2
FIRM = 1e-2
"""The least logit gap at which encryption decides nothing."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

GUIDE = f"""
import asyncio, json, sys
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig

async def main():
    engine = TenSafeAsyncEngine(TenSafeVLLMConfig(**json.loads(sys.argv[1])))
    async for token in engine.generate_stream({PROMPT!r}, max_tokens=int(sys.argv[2])):
        print(token, end="", flush=True)
    print("\\nSTATUS", json.dumps((await engine.status())["adapters"][0]))

if __name__ == "__main__":
    asyncio.run(main())
"""

WHOLE_API = f"""
import asyncio, json, sys
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig
from tensorguard.errors import AbortedError

async def main():
    said = {{}}
    async with TenSafeAsyncEngine(TenSafeVLLMConfig(**json.loads(sys.argv[1]))) as engine:
        said["chat"] = await engine.chat({MESSAGES!r}, adapter="red", max_tokens=12)
        said["base"] = await engine.generate({PROMPT!r}, use_adapter=False, max_tokens=12)
        long, stream = [], engine.generate_stream({PROMPT!r}, adapter="blue", max_tokens=200)
        long.append(await anext(stream))
        pack = await asyncio.create_subprocess_exec(*json.loads(sys.argv[2]))
        assert await pack.wait() == 0
        said["added"] = await engine.add_adapter(sys.argv[3])
        said["new"] = await engine.generate({PROMPT!r}, adapter="blue", max_tokens=12)
        said["old"] = "".join(long + [piece async for piece in stream])
        try:
            async for piece in engine.generate_stream({PROMPT!r}, adapter="blue", max_tokens=400, request_id="mine"):
                await engine.abort("mine")
        except AbortedError:
            said["aborted"] = True
        await engine.remove_adapter("red")
        said["left"] = engine.adapters
    print(json.dumps(said))

if __name__ == "__main__":
    asyncio.run(main())
"""


@dataclass(frozen=True)
class Packed:
    """A base model and packages for it: red, blue, and a next release blue-2, which is not packed yet."""

    folder: Path
    model: Path
    keys: Path
    state: Path

    @property
    def options(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "tssp_package_path": str(self.folder / "red.tssp"),
            "enable_he_lora": True,
            "state_dir": str(self.state),
            "dtype": "float32",
            "max_model_len": 512,
            "kv_cache_gib": 0.25,
        }

    def command(self, name: str, sequence: int = 1) -> list[str]:
        """What packs an adapter."""
        arguments = {
            "--adapter": self.folder / name,
            "--base-model": self.model,
            "--output": self.folder / f"{name}.tssp",
            "--tenant": "tenant",
            "--package-id": name.removesuffix("-2"),
            "--sequence": sequence,
            "--signing-key": self.keys / "tssp-signing-key.pem",
            "--attestor-state": self.state,
        }
        pairs = [str(part) for pair in arguments.items() for part in pair]
        return [sys.executable, "-m", "tensorguard.cli.main", "pack", *pairs]

    def start(self, script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        path = self.folder / "script.py"
        path.write_text(script)
        return subprocess.Popen(
            # As in a terminal: what a script starts in the background ignores SIGINT, and so do its children.
            [
                "env",
                "--default-signal=INT",
                sys.executable,
                str(path),
                json.dumps({**self.options, **options}),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment(),
        )

    def reference(self, adapter: str | None, prompt: dict[str, Any], tokens: int) -> ReferenceAnswer:
        answer = ReferenceModel(self.model, self.folder / adapter if adapter else None).answer(prompt, tokens)
        assert min(answer.gaps[:12]) > FIRM, "a choice hangs by a hair: take another seed"
        return answer


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("engine")
    made = Packed(folder, write_letter_llama(folder / "model", layers=LAYERS), folder / "publisher", folder / "state")
    tensafe = [sys.executable, "-m", "tensorguard.cli.main"]
    subprocess.run([*tensafe, "keys", "generate", "--output", str(made.keys)], check=True, cwd=ROOT)
    for seed, name in enumerate(("red", "blue", "blue-2")):
        write_random_lora(folder / name, made.model, rank=4 + 4 * seed, strength=0.3, seed=seed)
        if name != "blue-2":
            subprocess.run(made.command(name), check=True, cwd=ROOT, env=environment())
    return made


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(alive(process) for process in processes):
        time.sleep(0.2)
    assert [process for process in processes if alive(process)] == []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def running(packed: Packed) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A script in the middle of a long generation, and all processes below it."""
    process = packed.start(GUIDE, "450")
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)
        assert first, process.communicate()[1]
        yield process, descendants(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_the_guides_script_prints_the_plaintext_adapters_answer(packed: Packed) -> None:
    expected = packed.reference("red", {"prompt": PROMPT}, 12)
    # The guide's script neither shuts the engine down nor leaves a context.
    process = packed.start(GUIDE, "12")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert errors.count("SIMULATED EVIDENCE") == 1
    text, _, status = output.partition("\nSTATUS ")
    assert text == expected.text
    numbers = json.loads(status)
    assert (numbers["name"], numbers["coprocessor_evidence_kind"]) == ("red", "simulated")
    assert (numbers["rotations"], numbers["evaluation_key_bytes"], numbers["failures"]) == (0, 0, 0)
    # One call for each layer, group (qkv and o) and forward pass.
    assert numbers["calls"] == LAYERS * 2 * 12
    assert_nothing_left(packed)


def test_the_whole_api(packed: Packed) -> None:
    """Two packages from the start; one is replaced while it answers."""
    again = packed.command("blue-2", sequence=2)
    process = packed.start(
        WHOLE_API, json.dumps(again), str(packed.folder / "blue-2.tssp"), adapters=[str(packed.folder / "blue.tssp")]
    )
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    said = json.loads(output.splitlines()[-1])
    assert (said["added"], said["aborted"], said["left"]) == ("blue", True, ["blue"])
    assert said["chat"] == packed.reference("red", {"messages": MESSAGES}, 12).text
    assert said["base"] == packed.reference(None, {"prompt": PROMPT}, 12).text
    assert said["new"] == packed.reference("blue-2", {"prompt": PROMPT}, 12).text
    expected = packed.reference("blue", {"prompt": PROMPT}, 200)
    firm = next((i for i, gap in enumerate(expected.gaps) if gap <= FIRM), 200)
    assert len(said["old"]) == 200 and said["old"][:firm] == expected.text[:firm]
    assert_nothing_left(packed)


def assert_nothing_left(packed: Packed) -> None:
    assert_gone([p for p in psutil.process_iter() if str(packed.folder) in " ".join(safe_command(p))])


def safe_command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_stopped_leaves_no_process(
    running: tuple[subprocess.Popen[str], list[psutil.Process]], number: signal.Signals
) -> None:
    process, below = running
    assert len(below) >= 4  # attestor, coprocessor, vLLM's engine and what they need
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert_gone(below)


def test_attestation_that_is_required_is_not_simulated(packed: Packed) -> None:
    process = packed.start(GUIDE, "1", require_attestation=True)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output == ""
    assert "require_attestation=False" in errors


def test_another_base_model_is_refused_before_anything_is_served(packed: Packed) -> None:
    other = packed.folder / "other"
    other.mkdir()
    for path in packed.model.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config.json").unlink()
    config = json.loads((packed.model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 123456.0}))
    process = packed.start(GUIDE, "1", model=str(other))
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output == ""
    assert "BaseModelMismatchError" in errors
    assert "config" in errors
