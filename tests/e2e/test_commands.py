"""The commands people type: the guide's server, and `up` and `down`, as processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
from rich.console import Console

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER, add_options, prepare
from tensorguard.stack.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
FREE = ("--port", "--attestor-port", "--coprocessor-port", "--inference-port", "--gateway-admin-port")
GREETING = [{"role": "user", "content": "Hello!"}]


def demo_options(state: Path) -> list[str]:
    options = ["--cache-dir", str(ROOT / ".cache"), "--adapter", str(ROOT / "examples/demo_adapter/adapter")]
    return [*options, "--state-dir", str(state), *(word for name in FREE for word in (name, "0"))]


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def wait_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=40)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, alive


def wait_for_line(file: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while text not in file.read_text():
        assert process.poll() is None and time.monotonic() < deadline, file.read_text()
        time.sleep(0.2)


def test_the_guides_server_and_its_sudden_death(tmp_path: Path) -> None:
    settings, demo = prepare(
        add_options(argparse.ArgumentParser()).parse_args(demo_options(tmp_path / "state")), Console(stderr=True)
    )
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "tensorguard.backends.vllm.server", "--model", str(demo.model)]
    command += ["--he-lora-path", str(demo.packaged.package), "--port", str(port), "--api-key", "tensafe-test"]
    command += ["--state-dir", str(settings.attestor_state), "--max-model-len", "512"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        wait_for_line(log, "Serving on", process)
        assert f"model '{BASE_NAME}' is answered by the adapter" in log.read_text()
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="tensafe-test", max_retries=0)
        assert {model.id for model in client.models.list()} == {BASE_NAME, DEMO_ADAPTER}
        for model in (BASE_NAME, DEMO_ADAPTER):
            answer = client.chat.completions.create(model=model, messages=GREETING, max_tokens=4)
            assert answer.choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        everything = family(process.pid)
        assert len(everything) >= 6  # launcher, guardian and four services
    finally:
        process.kill()
        process.wait()
    wait_gone(everything)


def test_up_leaves_it_running_and_down_stops_it(tmp_path: Path) -> None:
    options = demo_options(tmp_path / "state")
    tool = [sys.executable, "-m", "tensorguard.cli.up"]
    everything: list[psutil.Process] = []
    try:
        up = subprocess.run([*tool, "up", *options], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert up.returncode == 0, up.stderr
        state = json.loads((tmp_path / "state" / "stack.json").read_text())
        everything = family(state["pid"])
        url = f"http://{state['gateway']}/v1"
        assert url in up.stdout and "grpcurl" in up.stdout and "from openai import OpenAI" in up.stdout
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
        assert client.chat.completions.create(model=BASE_NAME, messages=GREETING, max_tokens=2).choices
        down = subprocess.run([*tool, "down", *options], capture_output=True, text=True)
        assert down.returncode == 0 and "Stopped" in down.stderr
        # `down` returns only when nothing is left.
        assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        if everything and everything[0].is_running():
            os.kill(everything[0].pid, signal.SIGTERM)
            wait_gone(everything)
