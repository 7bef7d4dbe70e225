"""The attestor as a process: start, readiness, clear errors, exit codes, permissions."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.attestor.settings import load_settings
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.store.database import FILE_NAME

ROOT = Path(__file__).resolve().parents[3]
CODE = "ab" * 48


@pytest.fixture
def state(tmp_path: Path) -> DevelopmentState:
    return initialise_development_state(tmp_path / "state", "tenant", measurement=CODE)


def arguments(state: DevelopmentState, **changes: str) -> list[str]:
    options = {
        "state-dir": str(state.state_dir),
        "policy-file": str(state.policy_file),
        "simulated-root-public-key": str(state.simulated_root_public_key),
        "listen": "127.0.0.1:0",
        **changes,
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@contextmanager
def running(options: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.attestor", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                yield process, event["address"]
                return
        raise AssertionError(process.communicate()[1])
    finally:
        process.kill()
        process.communicate()


def fails(options: list[str]) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "services.attestor", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_serves_and_stops_on_sigterm(state: DevelopmentState) -> None:
    with running(arguments(state)) as (process, address):
        client = AttestorClient(address, thumbprint=state.attestor_thumbprint)
        client.attest(
            WorkloadIdentity.generate(),
            SimulatedPlatform(state.simulated_root_key, measurement=CODE),
            role=Role.INFERENCE,
            tenant="tenant",
        )
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    for path in state.state_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_busy_port(state: DevelopmentState) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in fails(arguments(state, listen=f"127.0.0.1:{port}"))


def test_missing_policy(state: DevelopmentState) -> None:
    assert "nowhere.yaml" in fails(arguments(state, **{"policy-file": "nowhere.yaml"}))


def settings_error(options: list[str]) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load_settings(options)
    return refused.value.message


def test_settings_are_refused_by_name(state: DevelopmentState, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "state" in settings_error([])
    assert "--listen" in settings_error(arguments(state, listen="nowhere"))
    monkeypatch.setenv("TENSAFE_ATTESTOR_POLCY_FILE", "x")
    assert "TENSAFE_ATTESTOR_POLCY_FILE" in settings_error(arguments(state))


def test_settings_from_the_environment(state: DevelopmentState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_ATTESTOR_STATE_DIR", str(state.state_dir))
    monkeypatch.setenv("TENSAFE_ATTESTOR_POLICY_FILE", str(state.policy_file))
    settings = load_settings([])
    assert settings.state_dir == state.state_dir
    assert settings.listen == "127.0.0.1:7401"
    assert settings.reflection is False


def test_changed_audit_log_stops_the_start(state: DevelopmentState) -> None:
    with running(arguments(state)) as (process, _):
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    with sqlite3.connect(state.state_dir / FILE_NAME) as database:
        database.execute("UPDATE audit SET line = replace(line, 'development', 'production.')")
    assert "record 1: its content was changed" in fails(arguments(state))
    with sqlite3.connect(state.state_dir / FILE_NAME) as database:
        database.execute("DELETE FROM audit")
    assert "it was set back" in fails(arguments(state))


def test_two_attestors_serve_one_database(state: DevelopmentState) -> None:
    """A challenge of one of them can be answered to the other, and both write one audit log."""
    with running(arguments(state)) as (_, first), running(arguments(state)) as (_, second):
        for address in (first, second):
            client = AttestorClient(address, thumbprint=state.attestor_thumbprint)
            client.attest(
                WorkloadIdentity.generate(),
                SimulatedPlatform(state.simulated_root_key, measurement=CODE),
                role=Role.INFERENCE,
                tenant="tenant",
            )
            assert client.status().audit_records == (3 if address == first else 4)
            client.close()


def test_state_of_an_earlier_version_is_refused(state: DevelopmentState) -> None:
    (state.state_dir / "packages.sqlite3").touch()
    assert "earlier version (packages.sqlite3)" in fails(arguments(state))
