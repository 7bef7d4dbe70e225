"""Options of a session reach it: from the configuration, or the service's settings, through the worker's settings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.inference.__main__ import serve
from services.inference.settings import load_settings
from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig, config, connect
from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import InternalError
from tensorguard.session.options import SessionOptions
from tests.backends.test_require_attestation import ENDPOINTS, NAMED, package

__all__ = ["package"]  # a fixture


class StoppedError(Exception):
    """Stands for everything after what is looked at."""


def connection_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> AdapterConnection:
    seen: list[AdapterConnection] = []

    async def start(_options: Any, connections: list[AdapterConnection], **_: Any) -> EngineCore:
        seen.extend(connections)
        raise StoppedError

    monkeypatch.setattr(EngineCore, "start", start)
    engine = TenSafeAsyncEngine(TenSafeVLLMConfig(model="m", enable_he_lora=True, **options))
    with pytest.raises(StoppedError):
        asyncio.run(engine.start())
    return seen[0]


@pytest.mark.parametrize("checked", [False, True])
def test_from_the_configuration_to_the_connection(
    monkeypatch: pytest.MonkeyPatch, package: Path, checked: bool
) -> None:
    given = connection_of(monkeypatch, he_checked_mode=checked, **ENDPOINTS, **NAMED)
    state = package.parent / "state"
    embedded = connection_of(monkeypatch, he_checked_mode=checked, tssp_package_path=package, state_dir=state)
    assert given.checked is embedded.checked is checked


@pytest.mark.parametrize("checked", [False, True])
def test_from_the_connection_to_the_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checked: bool) -> None:
    seen: list[SessionOptions] = []

    def refuse(*_: Any, options: SessionOptions, **__: Any) -> Any:
        seen.append(options)
        raise StoppedError

    monkeypatch.setattr(connect.CoprocessorSession, "open", refuse)
    for name in ("base_model_identity", "host_platform"):
        monkeypatch.setattr(connect, name, lambda _: None)
    monkeypatch.setattr(connect, "Workload", lambda *_, **__: None)
    monkeypatch.setattr(connect, "packed_parameter_set", lambda *_, **__: "n4096-q90-w12")
    monkeypatch.setattr(config.VerifyingKeys, "read", lambda _: None)
    adapter = AdapterConnection(name="a", checked=checked, publisher_keys=NAMED["publisher_keys"], **ENDPOINTS)
    settings = WorkerSettings(model_path=tmp_path, pool_bytes=1 << 20, shared_memory_bytes=1 << 16)
    with pytest.raises(StoppedError):
        connect.Connector(settings).connect(adapter)
    assert seen == [SessionOptions(checked=checked, pool_bytes=1 << 20, shared_memory_bytes=1 << 16)]


def test_from_the_services_settings_to_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen: list[WorkerSettings] = []

    def refuse(arguments: Any) -> Any:
        seen.append(arguments.additional_config)
        raise StoppedError

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", refuse)
    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs", lambda **arguments: SimpleNamespace(**arguments))
    options = ["--model", str(tmp_path), "--pool-bytes", "0", "--shared-memory-bytes", "8192"]
    with pytest.raises(InternalError):
        asyncio.run(serve(load_settings(options)))
    assert (seen[0].pool_bytes, seen[0].shared_memory_bytes) == (0, 8192)


def test_the_defaults_are_the_sessions() -> None:
    settings, options = load_settings(["--model", "m"]), SessionOptions()
    assert (settings.pool_bytes, settings.shared_memory_bytes) == (options.pool_bytes, options.shared_memory_bytes)
