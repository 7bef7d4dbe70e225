"""`tensafe attest` on machines that the tests make up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorguard.cli.main import run
from tensorguard.evidence import platforms
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.tdx import collector
from tests.support.fake_tsm import FakeTsm, expected

DATA = bytes(range(64))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTsm:
    """A TDX trust domain."""
    fake = FakeTsm(tmp_path / "tsm" / "report").install(monkeypatch)
    monkeypatch.setattr(collector.TdxPlatform.__init__, "__defaults__", (fake.root,))
    monkeypatch.setattr(
        platforms.hardware_kind, "__kwdefaults__", {"report_root": fake.root, "nitro_device": tmp_path / "nsm"}
    )
    return fake


def test_evidence_of_this_machine(machine: FakeTsm, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attest", "--report-data", DATA.hex(), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["verified"]) == ("tdx", False)
    assert shown["report_data"] == DATA.hex()
    assert shown["evidence"] == expected(DATA).hex()


def test_nonce_is_filled_up(machine: FakeTsm, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attest", "--kind", "tdx", "--nonce", "abcd"]) == 0
    assert machine.requests[-1] == b"\xab\xcd" + bytes(62)
    assert expected(machine.requests[-1]).hex() in capsys.readouterr().out
    assert run(["attest", "--kind", "tdx"]) == 0
    assert run(["attest", "--kind", "tdx"]) == 0
    assert len(set(machine.requests)) == 3


def test_files(machine: FakeTsm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "collected"
    assert run(["attest", "--report-data", DATA.hex(), "--output", str(folder)]) == 0
    assert (folder / "evidence").read_bytes() == expected(DATA)
    assert run(["attest", "--output", str(folder)]) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--nonce", "00", "--report-data", "00" * 64],
        ["--report-data", "00" * 63],
        ["--nonce", "0"],
        ["--kind", "mock"],
        ["--kind", "simulated"],
    ],
)
def test_wrong_usage(machine: FakeTsm, options: list[str]) -> None:
    assert run(["attest", *options]) == 2


def test_a_machine_without_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"report_root": tmp_path / "none", "nitro_device": tmp_path / "nsm"}
    monkeypatch.setattr(platforms.hardware_kind, "__kwdefaults__", nothing)
    assert run(["attest"]) == 2
    assert "this machine is no TEE that is known" in capsys.readouterr().err


def test_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = initialise_development_state(tmp_path / "state", "tenant", measurement="ab" * 48)
    capsys.readouterr()
    assert run(["attest", "--simulated-root-key", str(state.simulated_root_key), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "simulated"
