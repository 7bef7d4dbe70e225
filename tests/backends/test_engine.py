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

from tests.support.random_lora import write_random_lora

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
PROMPT = "Explain Homomorphic Encryption:"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MODEL.is_dir(), reason="the demo model is not prepared (make model)"),
]

SCRIPT = """
import asyncio, json, sys
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig

async def main():
    engine = TenSafeAsyncEngine(TenSafeVLLMConfig(**json.loads(sys.argv[1])))
    async for token in engine.generate_stream({prompt!r}, max_tokens=int(sys.argv[2])):
        print(token, end="", flush=True)
    {after}

if __name__ == "__main__":
    asyncio.run(main())
"""


@dataclass(frozen=True)
class Packed:
    folder: Path
    adapter: Path
    options: dict[str, Any]

    def script(self, after: str = "") -> Path:
        path = self.folder / "script.py"
        path.write_text(SCRIPT.format(prompt=PROMPT, after=after))
        return path

    def start(self, tokens: int, after: str = "", **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script(after)), json.dumps({**self.options, **options}), str(tokens)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=environment()
        )


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("engine")
    layers = range(0, 30, 3)
    adapter = write_random_lora(folder / "lora", MODEL, rank=8, strength=0.1, layers=layers, seed=3)
    keys, state, package = folder / "publisher", folder / "state", folder / "red.tssp"
    tensafe = [sys.executable, "-m", "tensorguard.cli.main"]
    subprocess.run([*tensafe, "keys", "generate", "--output", str(keys)], check=True, cwd=ROOT)
    arguments = {
        "--adapter": adapter,
        "--base-model": MODEL,
        "--output": package,
        "--tenant": "tenant",
        "--package-id": "red",
        "--sequence": 1,
        "--signing-key": keys / "tssp-signing-key.pem",
        "--attestor-state": state,
    }
    pairs = [str(part) for pair in arguments.items() for part in pair]
    subprocess.run([*tensafe, "pack", *pairs], check=True, cwd=ROOT)
    options = {
        "model": str(MODEL),
        "tssp_package_path": str(package),
        "enable_he_lora": True,
        "state_dir": str(state),
        "dtype": "float32",
        "max_model_len": 512,
    }
    return Packed(folder, adapter, options)


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
    process = packed.start(tokens=400)
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)
        assert first, process.communicate()[1]
        yield process, descendants(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_the_guides_script_prints_the_plaintext_adapters_answer(packed: Packed) -> None:
    prompts, answers = packed.folder / "prompts.json", packed.folder / "answers.json"
    prompts.write_text(json.dumps([{"prompt": PROMPT}]))
    command = [sys.executable, "-m", "tensorguard.models.reference", "--model", str(MODEL), "--max-tokens", "32"]
    command += ["--adapter", str(packed.adapter), "--prompts", str(prompts), "--json", str(answers)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment())
    (expected,) = json.loads(answers.read_text())

    # The guide's script neither shuts the engine down nor leaves a context.
    after = 'print("\\nSTATUS", json.dumps((await engine.status())["adapters"][0]))'
    process = packed.start(tokens=32, after=after)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert errors.count("SIMULATED EVIDENCE") == 1
    text, _, status = output.partition("\nSTATUS ")
    assert text == expected["text"]
    numbers = json.loads(status)
    assert (numbers["name"], numbers["coprocessor_evidence_kind"]) == ("red", "simulated")
    assert (numbers["rotations"], numbers["evaluation_key_bytes"], numbers["failures"]) == (0, 0, 0)
    # One call for each hooked layer and forward pass: 10 layers, qkv and o, 32 passes.
    assert numbers["calls"] == 10 * 2 * 32
    assert_gone([p for p in psutil.process_iter() if str(packed.folder) in " ".join(safe_command(p))])


def safe_command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_script_that_is_stopped_leaves_no_process(
    running: tuple[subprocess.Popen[str], list[psutil.Process]], number: signal.Signals
) -> None:
    process, below = running
    assert len(below) >= 4  # attestor, coprocessor, vLLM's engine and what they need
    process.send_signal(number)
    process.wait(timeout=60)
    assert_gone(below)


def test_attestation_that_is_required_is_not_simulated(packed: Packed) -> None:
    process = packed.start(tokens=1, require_attestation=True)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output == ""
    assert "require_attestation=False" in errors


def test_another_base_model_is_refused_before_anything_is_served(packed: Packed) -> None:
    other = packed.folder / "other"
    other.mkdir()
    for path in MODEL.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config.json").unlink()
    config = json.loads((MODEL / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 123456.0}))
    process = packed.start(tokens=1, model=str(other))
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output == ""
    assert "BaseModelMismatchError" in errors
    assert "config" in errors
