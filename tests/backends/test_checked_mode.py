"""The option for checked mode reaches the session, from the configuration through the worker's settings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig, config, connect
from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.core import EngineCore
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
    seen: list[bool] = []

    def refuse(*_: Any, options: Any, **__: Any) -> Any:
        seen.append(options.checked)
        raise StoppedError

    monkeypatch.setattr(connect.CoprocessorSession, "open", refuse)
    for name in ("base_model_identity", "host_platform"):
        monkeypatch.setattr(connect, name, lambda _: None)
    monkeypatch.setattr(connect, "Workload", lambda *_, **__: None)
    monkeypatch.setattr(config.VerifyingKeys, "read", lambda _: None)
    adapter = AdapterConnection(name="a", checked=checked, publisher_keys=NAMED["publisher_keys"], **ENDPOINTS)
    settings = WorkerSettings(model_path=tmp_path, require_attestation=False, simulated_root_key=tmp_path / "root")
    with pytest.raises(StoppedError):
        connect.Connector(settings).connect(adapter)
    assert seen == [checked]
