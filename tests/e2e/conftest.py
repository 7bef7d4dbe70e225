from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from tensorguard.cli.demo_setup import Demo, add_options, engine_of, prepare
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.settings import StackSettings
from tensorguard.stack.stack import Endpoints, start_stack

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stack:
    """The demo's four services, each a process of its own."""

    demo: Demo
    settings: StackSettings
    endpoints: Endpoints
    launcher: Launcher

    def pid(self, name: str) -> int:
        (process,) = (p for p in self.launcher.processes if p.spec.name == name)
        return process.pid


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """The environment for an engine that is started by the test itself."""
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **single}):
        yield


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("state") / "stack"
    arguments = ["--cache-dir", str(ROOT / ".cache"), "--adapter", str(ROOT / "examples/demo_adapter/adapter")]
    arguments += ["--state-dir", str(state)]
    for name in ("port", "attestor-port", "coprocessor-port", "inference-port", "gateway-admin-port"):
        arguments += [f"--{name}", "0"]
    options = add_options(argparse.ArgumentParser()).parse_args(arguments)
    settings, demo = prepare(options, Console(stderr=True))
    with Launcher(settings.logs) as launcher:
        endpoints = start_stack(launcher, settings, [demo.packaged], engine_of(demo))
        yield Stack(demo, settings, endpoints, launcher)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return list(json.loads((ROOT / "examples/demo_adapter/prompts.json").read_text()))


def reference(stack: Stack, prompts: Sequence[str], max_tokens: int, folder: Path) -> list[dict[str, Any]]:
    """What unmodified PEFT answers in float32, in another process, from the original safetensors."""
    conversations = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    (folder / "prompts.json").write_text(json.dumps(conversations))
    command = [sys.executable, "-m", "tensorguard.models.reference", "--model", str(stack.demo.model)]
    command += ["--adapter", str(stack.demo.adapter), "--prompts", str(folder / "prompts.json"), "--ignore-eos"]
    command += ["--max-tokens", str(max_tokens), "--json", str(folder / "answers.json")]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return list(json.loads((folder / "answers.json").read_text()))
