"""Which evidence `require_attestation` permits, for services given by endpoint and for embedded ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig, connect, sources
from tensorguard.backends.vllm.config import WorkerSettings
from tensorguard.backends.vllm.connect import host_platform
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.development import DevelopmentState
from tensorguard.stack import embedded
from tensorguard.stack.services import PackagedAdapter
from tensorguard.stack.stack import Trust

ENDPOINTS: dict[str, Any] = {"coprocessor_endpoint": "127.0.0.1:1", "attestor_endpoint": "127.0.0.1:2"}
NAMED: dict[str, Any] = {"adapter_name": "a", "publisher_keys": (Path("/publisher.pem"),)}
STATE = DevelopmentState(Path("/s"), Path("/s/policy"), Path("/s/root"), Path("/s/root.pub"), "thumbprint")


class EngineStartedError(Exception):
    """Stands for everything after the decision."""


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the engine was told; it is not really started."""
    told: list[bool] = []

    async def start(*_arguments: Any, require_attestation: bool, **_options: Any) -> EngineCore:
        told.append(require_attestation)
        raise EngineStartedError

    monkeypatch.setattr(EngineCore, "start", start)
    return told


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose embedded services are not really started."""
    path = tmp_path / "adapter.tssp"
    path.write_bytes(b"")
    adapter = PackagedAdapter("a", path, "tenant", "ab" * 32, NAMED["publisher_keys"])
    trust = Trust("127.0.0.1:2", "thumbprint", "127.0.0.1:1", Path("/s/root"))
    monkeypatch.setattr(sources, "find_adapter", lambda *_: adapter)
    monkeypatch.setattr(embedded, "choose_ports", lambda *_: {})
    monkeypatch.setattr(embedded, "start_trust", lambda *_: (trust, STATE))
    return path


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def start(**options: Any) -> None:
    engine = TenSafeAsyncEngine(TenSafeVLLMConfig(model="m", enable_he_lora=True, **options))
    asyncio.run(engine.start())


@pytest.mark.parametrize(("value", "hardware_only"), [(None, True), (True, True), (False, False)])
def test_services_given_by_endpoint(required: list[bool], log: list[Any], value: Any, hardware_only: bool) -> None:
    with pytest.raises(EngineStartedError):
        start(require_attestation=value, **ENDPOINTS, **NAMED)
    assert required == [hardware_only]
    assert log == []


@pytest.mark.parametrize("options", [{}, {"require_attestation": None}, {"require_attestation": False}])
def test_embedded_services_simulate_with_one_warning(
    required: list[bool], package: Path, log: list[Any], options: dict[str, Any]
) -> None:
    with pytest.raises(EngineStartedError):
        start(tssp_package_path=package, state_dir=package.parent / "state", **options)
    assert required == [False]
    (warning,) = [line for line in log if line["log_level"] == "warning"]
    assert "SIMULATED" in warning["event"] and "no hardware" in warning["event"]


def test_embedded_services_are_not_started_when_hardware_is_required(
    required: list[bool], package: Path, log: list[Any]
) -> None:
    with pytest.raises(EvidenceRefusedError, match="require_attestation=False"):
        start(tssp_package_path=package, require_attestation=True)
    assert required == [] and log == []


def test_the_warning_reaches_standard_error_of_a_plain_script(
    required: list[bool], package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineStartedError):
        start(tssp_package_path=package, state_dir=package.parent / "state")
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("SIMULATED EVIDENCE") == 1


def test_a_host_without_hardware_is_refused_with_the_option_that_permits_it() -> None:
    settings = WorkerSettings(model_path=Path("/m"), simulated_root_key=Path("/s/root"))
    with pytest.raises(EvidenceRefusedError, match="require_attestation=False"):
        host_platform(settings)


def test_a_host_with_hardware_attests_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "hardware_kind", lambda: EvidenceKind.TDX)
    for settings in (
        WorkerSettings(model_path=Path("/m"), simulated_root_key=Path("/s/root")),
        WorkerSettings(model_path=Path("/m"), require_attestation=False),
    ):
        assert host_platform(settings).kind is EvidenceKind.TDX
