"""A program that uses the Python API and is told to stop in the middle of an answer leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.package.publishers import remember_publisher
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.support.letter_llama import write_letter_llama
from tests.support.open_files import shared_memory_of
from tests.support.random_lora import write_random_lora

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, END_SECONDS = 240, 40
GRACE_SECONDS = 5
"""For helpers (of the launcher, of multiprocessing) that end when they see that the program is gone."""
PROGRAM = """
import asyncio, sys
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig

async def main(model, package, state):
    config = TenSafeVLLMConfig(
        model=model, tssp_package_path=package, state_dir=state, enable_he_lora=True, dtype="float32", kv_cache_gib=0.1
    )
    async with TenSafeAsyncEngine(config) as engine:
        while True:
            async for piece in engine.generate_stream("Once upon a time", max_tokens=1000):
                print(end=piece, flush=True)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


@dataclass(slots=True)
class Program:
    """A running program, with all that belongs to it while it answers."""

    process: subprocess.Popen[bytes]
    output: Path
    family: list[psutil.Process]
    regions: set[Path]
    """Names in /dev/shm of what its processes have mapped or open, whether or not they are still there."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[signal.Signals, Program]]:
    """One for each signal, started together."""
    folder = tmp_path_factory.mktemp("ending")
    (folder / "program.py").write_text(PROGRAM)
    model, publisher = write_letter_llama(folder / "model"), SigningKeys.generate()
    pack_adapter(
        write_random_lora(folder / "adapter", model, rank=4),
        folder / "red.tssp",
        base_model_dir=model,
        tenant="tenant",
        package_id="red",
        sequence=1,
        signing_keys=publisher,
        key_registrar=AttestorState.open(folder / "state").packages.register,
    )
    remember_publisher(folder / "state", publisher.public)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        started = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            state, output = folder / f"{number.name}.state", folder / f"{number.name}.txt"
            shutil.copytree(folder / "state", state)
            with output.open("wb") as stream, (folder / f"{number.name}.log").open("wb") as log:
                process = subprocess.Popen(
                    # As in a terminal: what a script starts in the background ignores SIGINT, and so do its children.
                    ["env", "--default-signal=INT", sys.executable, "program.py", "model", "red.tssp", str(state)],
                    cwd=folder,
                    env={**os.environ, **offline},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=log,
                    start_new_session=True,
                )
            stack.callback(process.kill)
            started[number] = process, output
        yield {number: running(process, output) for number, (process, output) in started.items()}


def running(process: subprocess.Popen[bytes], output: Path) -> Program:
    deadline = time.monotonic() + START_SECONDS
    while len(output.read_text()) < 20:
        assert process.poll() is None and time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.2)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return Program(process, output, family, set().union(*(shared_memory_of(p.pid) for p in family)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(programs: Mapping[signal.Signals, Program], number: signal.Signals) -> None:
    program = programs[number]
    assert len(program.family) >= 4, "an engine, an attestor and a coprocessor"
    assert any(region.name.startswith("tensafe-") for region in program.regions), "nothing is shared"
    assert program.process.poll() is None
    if number == signal.SIGINT:  # as a terminal sends Ctrl-C
        os.killpg(program.process.pid, number)
    else:
        program.process.send_signal(number)
    log = program.output.with_suffix(".log")
    assert program.process.wait(END_SECONDS) == (-number if number == signal.SIGINT else 128 + number), log.read_text()
    _, left = psutil.wait_procs(program.family, timeout=GRACE_SECONDS)
    assert not left, left
    assert not [region for region in program.regions if region.exists()]
    assert "leaked" not in log.read_text()
