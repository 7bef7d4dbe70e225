"""What keeps an adapter from being attached ends the command and the engine with an error of its own, and no token.

Attestor, coprocessor and everything between them and the worker are real. Of vLLM only the process is not there: a
stand-in attaches the adapters as `HeLoraWorker` does, and would answer every request.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from services.inference.__main__ import main
from tensorguard import errors
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig
from tensorguard.backends.vllm.attachments import Attachments
from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.connect import Connector
from tensorguard.backends.vllm.install import Attachment
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import TenSafeError
from tensorguard.evidence.development import initialise_development_state
from tests.support.adapters import write_base_model
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world


class AttachedError(errors.InternalError):
    """Nothing was wrong: vLLM would now serve."""


class NoHooks:
    """In the place of the model's hooks."""

    def fit(self, attachment: Attachment) -> Any:
        raise AttachedError("the adapter is attached")


class Llm:
    """In the place of vLLM's AsyncLLM: the worker's methods, called here."""

    stopped = 0

    def __init__(self, settings: WorkerSettings) -> None:
        self.attachments = Attachments(Connector(settings), NoHooks())  # type: ignore[arg-type]

    @classmethod
    def from_engine_args(cls, arguments: Any) -> Llm:
        return cls(arguments.additional_config)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "tensafe_attach":
            return [{"ticket": self.attachments.begin(AdapterConnection.model_validate(*args))}]
        assert method == "tensafe_attach_outcome"
        try:
            return [{"adapter": self.attachments.outcome(*args)}]
        except TenSafeError as error:
            return [{"error": {"reason": error.reason, "message": error.message}}]

    def shutdown(self, timeout: float | None = None) -> None:
        Llm.stopped += 1


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm.engine.arg_utils", AsyncEngineArgs=SimpleNamespace)
    module("vllm.v1.engine.async_llm", AsyncLLM=Llm)
    monkeypatch.setattr(Llm, "stopped", 0)
    with mock.patch.dict(os.environ):  # the engine sets vLLM's variables
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world")) as running:
        yield running


def options_for(world: World) -> dict[str, Any]:
    """Options of `TenSafeVLLMConfig` under which everything is right."""
    return {
        "model": str(world.folder / "model"),
        "served_model_name": "base",
        "kv_cache_gib": 1.0,
        "adapter_name": ADAPTER,
        "coprocessor_endpoint": world.endpoint,
        "attestor_endpoint": world.attestor,
        "attestor_thumbprint": world.state.attestor_thumbprint,
        "publisher_keys": tuple(world.settings.publisher_keys),
        "tenant": TENANT,
        "simulated_root_key": world.state.simulated_root_key,
        "require_attestation": False,
    }


Change = Callable[[World, Path, pytest.MonkeyPatch], dict[str, Any]]


def another_root(world: World, folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"simulated_root_key": initialise_development_state(folder / "foreign", TENANT).simulated_root_key}


def another_publisher(world: World, folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "stranger.pem").write_bytes(SigningKeys.generate().public.to_pem())
    return {"publisher_keys": (folder / "stranger.pem",)}


def another_config(world: World, folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model": str(write_base_model(folder / "model", rope_theta=123456.0))}


def another_tokenizer(world: World, folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.copytree(world.folder / "model", folder / "model")
    (folder / "model" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    return {"model": str(folder / "model")}


def expired_token(world: World, _: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    client = world.coprocessor.servicer._workload.client
    monkeypatch.setattr(client, "_clock", lambda: time.time() + 600)
    # The coprocessor's own token would be renewed first, and be from the future for everybody else.
    monkeypatch.setattr(world.coprocessor.servicer._workload, "_clock", time.time)
    return {}


REFUSALS: dict[str, tuple[Change | dict[str, Any], type[TenSafeError], tuple[str, ...]]] = {
    "attestor": (
        {"attestor_endpoint": "127.0.0.1:1"},
        errors.UnavailableError,
        ("attestor 127.0.0.1:1", "is it running"),
    ),
    "coprocessor": ({"coprocessor_endpoint": "127.0.0.1:2"}, errors.UnavailableError, ("127.0.0.1:2", "is it running")),
    "thumbprint": ({"attestor_thumbprint": "A" * 43}, errors.TokenError, ("check its address and the configured",)),
    "root": (another_root, errors.EvidenceRefusedError, ("set simulated_root_key",)),
    "publisher": (
        another_publisher,
        errors.PackageError,
        ("not trusted here", "give the public key file of who packed it"),
    ),
    "adapter": (
        {"adapter_name": "nobody"},
        errors.NotFoundError,
        ("'nobody' is not served here (served: tiny)", "correct"),
    ),
    "tenant": ({"tenant": "other"}, errors.EvidenceRefusedError, ("tenant",)),
    "config": (another_config, errors.BaseModelMismatchError, ("another config", "Serve the model it was made for")),
    "tokenizer": (another_tokenizer, errors.BaseModelMismatchError, ("another tokenizer", "or pack the adapter")),
    "hardware": ({"require_attestation": True}, errors.EvidenceRefusedError, ("set require_attestation=False",)),
    "token": (expired_token, errors.TokenExpiredError, ("attest again", "check both machines' clocks")),
}


@pytest.fixture(params=[None, *REFUSALS])
def refused(
    request: pytest.FixtureRequest, world: World, llm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], type[TenSafeError], tuple[str, ...]]:
    """Options with one thing wrong, and the error that says so. Without anything wrong vLLM would serve."""
    if request.param is None:
        return options_for(world), errors.InternalError, ("the adapter is attached",)
    change, error, texts = REFUSALS[request.param]
    changed = change if isinstance(change, dict) else change(world, tmp_path, monkeypatch)
    return options_for(world) | changed, error, texts


def test_the_service_exits_with_one_line(
    refused: tuple[dict[str, Any], type[TenSafeError], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, error, texts = refused
    adapter = {"name": options.pop("adapter_name"), "tenant": options.pop("tenant")}
    for name in ("coprocessor_endpoint", "attestor_endpoint", "attestor_thumbprint"):
        adapter[name] = options.pop(name)
    adapter["publisher_keys"] = [str(path) for path in options.pop("publisher_keys")]
    for name, value in options.items():
        monkeypatch.setenv(f"TENSAFE_INFERENCE_{name.upper()}", str(value))
    monkeypatch.setenv("TENSAFE_INFERENCE_ADAPTERS", json.dumps([adapter]))
    monkeypatch.setattr(sys, "argv", ["services.inference"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test run keeps its own handlers
    assert main() == 1
    output, lines = capsys.readouterr()
    assert '"ready"' not in output
    (line,) = lines.splitlines()
    assert line.startswith("error: ") and line.endswith(f"[{error.reason}]")
    for text in texts:
        assert text in line


def test_the_library_raises_and_yields_nothing(
    refused: tuple[dict[str, Any], type[TenSafeError], tuple[str, ...]],
) -> None:
    options, error, texts = refused
    tokens: list[str] = []

    async def ask() -> None:
        engine = TenSafeAsyncEngine(TenSafeVLLMConfig(enable_he_lora=True, **options))
        async for token in engine.generate_stream("Hello"):
            tokens.append(token)

    with pytest.raises(error) as caught:
        asyncio.run(ask())
    assert type(caught.value) is error
    for text in texts:
        assert text in caught.value.message
    assert tokens == []
    assert Llm.stopped == 1, "no engine is left running"


@pytest.mark.parametrize("change", [another_config, another_tokenizer])
def test_a_given_package_shows_another_base_model_before_the_engine_starts(
    world: World, llm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    options = options_for(world) | {"tssp_package_path": world.settings.packages[0]}
    engine = TenSafeAsyncEngine(
        TenSafeVLLMConfig(enable_he_lora=True, **(options | change(world, tmp_path, monkeypatch)))
    )
    with pytest.raises(errors.BaseModelMismatchError):
        asyncio.run(engine.start())
    assert Llm.stopped == 0
    engine = TenSafeAsyncEngine(TenSafeVLLMConfig(enable_he_lora=True, **options))
    with pytest.raises(errors.InternalError, match="the adapter is attached"):
        asyncio.run(engine.start())


@pytest.mark.parametrize(
    ("options", "variables", "code", "named"),
    [
        (["--model", "m", "--modell", "x"], {}, 2, "--modell"),
        (["--model", "m", "--dtyp", "float32"], {}, 2, "--dtyp"),  # no abbreviations
        (["--model", "m"], {"TENSAFE_INFERENCE_DTYP": "x"}, 1, "TENSAFE_INFERENCE_DTYP"),
        (["--model", "m"], {"TENSAFE_INFERENC_DTYPE": "x"}, 1, "TENSAFE_INFERENC_DTYPE"),
        (["--model", "/nowhere/model"], {}, 1, "give the path of a model folder [not_found]"),
    ],
)
def test_the_service_refuses_what_it_cannot_use_by_name(
    options: list[str], variables: dict[str, str], code: int, named: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.inference", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert named in result.stderr.splitlines()[-1]
