"""`tensafe audit`, `tensafe attestor` and `tensafe revoke` on a real state directory."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tensorguard.cli.main import run
from tensorguard.errors import InvalidInputError
from tensorguard.evidence.keys import AttestorKey
from tensorguard.rpc.certificates import ServiceName
from tensorguard.store.audit_head import AuditHead
from tensorguard.store.database import FILE_NAME
from tensorguard.store.enrolments import use_enrolment
from tensorguard.store.revocations import RevocationKind, Subject, revocations
from tensorguard.store.state import AttestorState


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "state"
    with AttestorState.open(made) as state:
        for number in range(3):
            state.audit.append("attest", {"number": number})
    monkeypatch.setenv("TENSAFE_ATTESTOR_STATE_DIR", str(made))
    return made


def head(folder: Path) -> AuditHead:
    with AttestorState.open(folder) as state:
        return state.audit.head


def test_verify_in_the_database(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["records"], report["signatures"]) == (True, 3, "checked")
    with sqlite3.connect(folder / FILE_NAME) as connection:
        connection.execute("""UPDATE audit SET line = replace(line, '"number":1', '"number":9')""")
    assert run(["audit", "verify"]) == 3
    assert "record 2: its content was changed" in capsys.readouterr().err


def test_verify_an_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, keys = tmp_path / "audit.jsonl", tmp_path / "keys.json"
    assert run(["audit", "export", "--output", str(log), "--keys", str(keys)]) == 0
    capsys.readouterr()
    assert run(["audit", "verify", str(log)]) == 0
    assert "not checked (no --keys)" in capsys.readouterr().out
    assert run(["audit", "verify", str(log), "--keys", str(keys), "--head", f"3:{head(folder).hash}"]) == 0
    (tmp_path / "others.json").write_bytes(AttestorKey.generate().key_set().to_jwks())
    assert run(["audit", "verify", str(log), "--keys", str(tmp_path / "others.json")]) == 3
    lines = log.read_bytes().splitlines(keepends=True)
    for changed in ([lines[0], lines[2]], [lines[1], lines[0], lines[2]], [lines[0], lines[1].replace(b"1", b"2", 1)]):
        log.write_bytes(b"".join(changed))
        assert run(["audit", "verify", str(log)]) == 3
    log.write_bytes(b"".join(lines[:2]))
    assert run(["audit", "verify", str(log)]) == 0, "nobody knows without a head"
    assert run(["audit", "verify", str(log), "--head", f"3:{head(folder).hash}"]) == 3


def test_export_does_not_overwrite(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert run(["audit", "export", "--output", str(tmp_path / "log")]) == 2


@pytest.mark.parametrize("extra", [["--head", "x"], ["--keys", "nowhere.json"]])
def test_usage_errors(folder: Path, extra: list[str]) -> None:
    assert run(["audit", "verify", *extra]) == 2


def test_a_missing_export(tmp_path: Path) -> None:
    assert run(["audit", "verify", str(tmp_path / "nowhere")]) == 3


def test_backup_restore_and_acceptance(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attestor", "backup", "--output", str(tmp_path / "backup")]) == 0
    with AttestorState.open(folder) as state:
        state.audit.append("attest", {})
    (folder / FILE_NAME).unlink()
    assert run(["attestor", "restore", "--backup", str(tmp_path / "backup")]) == 3
    assert "[rollback]" in capsys.readouterr().err
    assert run(["attestor", "accept-rollback", "--why", "disk lost"]) == 0
    assert run(["audit", "verify"]) == 0
    assert run(["attestor", "restore", "--backup", str(tmp_path / "backup")]) == 2


def test_rotation_of_the_key_encryption_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["attestor", "rotate-kek", "--new", f"file:{folder}/new"]) == 0
    assert run(["audit", "verify"]) == 2
    monkeypatch.setenv("TENSAFE_ATTESTOR_KEY_ENCRYPTION_KEY", f"file:{folder}/new")
    assert run(["audit", "verify"]) == 0


def test_rotation_of_the_signing_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AttestorState.open(folder) as state:
        old = state.key.thumbprint
    assert run(["attestor", "rotate-signing-key", "--overlap-hours", "2"]) == 0
    output = capsys.readouterr().out
    with AttestorState.open(folder) as state:
        names = state.keys.valid().thumbprints
        assert names[0] == old == state.keys.current.thumbprint and f"{old},{names[1]}" in output
    assert run(["audit", "verify"]) == 0
    assert run(["attestor", "rotate-signing-key"]) == 2
    assert "announced" in capsys.readouterr().err


def test_the_authority_and_an_enrolment(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attestor", "authority"]) == 0
    shown = capsys.readouterr().out.encode()
    assert run(["attestor", "authority", "--output", str(tmp_path / "authority.pem")]) == 0
    assert (tmp_path / "authority.pem").read_bytes() == shown
    capsys.readouterr()
    assert run(["attestor", "enrol"]) == 0
    secret = capsys.readouterr().out.strip()
    with AttestorState.open(folder) as state:
        assert state.authority.pem == shown
        with state.database.writing() as connection:
            assert use_enrolment(connection, secret, 0) == ServiceName("gateway")
    assert run(["attestor", "enrol", "--role", "coprocessor"]) == 2
    assert "attested" in capsys.readouterr().err


def test_rotation_of_the_authority(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attestor", "rotate-authority", "--overlap-hours", "2", "--retire-hours", "3"]) == 0
    output = capsys.readouterr().out
    with AttestorState.open(folder) as state:
        old, new = state.authorities.trusted()
        assert state.authority.fingerprint == old.fingerprint and output.startswith(new.fingerprint)
    assert run(["attestor", "authority"]) == 0
    assert capsys.readouterr().out.encode() == old.pem + new.pem
    assert run(["audit", "verify"]) == 0
    assert run(["attestor", "rotate-authority"]) == 2
    assert "announced" in capsys.readouterr().err


def test_revocation_is_on_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["revoke", "version", "acme/law@3", "--note", "leaked"]) == 0
    assert run(["revoke", "measurement", "ab" * 48]) == 0
    assert run(["revoke", "version", "acme/law@3"]) == 0, "again is not an error"
    with AttestorState.open(folder) as state, state.database.reading() as connection:
        found = revocations(connection)
        assert [item.subject for item in found] == [
            Subject(RevocationKind.VERSION, "acme", "law", 3),
            Subject(RevocationKind.MEASUREMENT, value="ab" * 48),
        ]
        assert state.audit.head.records == 6


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        ("package", "acme"),
        ("package", "acme/law@3"),
        ("package", "Acme/law"),
        ("version", "acme/law"),
        ("version", "acme/law@x"),
        ("version", "acme/law@0"),
        ("version", f"acme/law@{'9' * 30}"),
        ("key", "xyz"),
        ("workload", "ab" * 32),
        ("measurement", "AB" * 48),
        ("measurement", "00" * 48),  # of every workload that has a register it does not use
        ("chip", ""),
        ("nothing", "x"),
    ],
)
def test_malformed_subjects_are_refused(folder: Path, kind: str, subject: str) -> None:
    before = head(folder)
    assert run(["revoke", kind, subject]) == 2
    assert head(folder) == before


def test_what_the_other_fields_are_for() -> None:
    with pytest.raises(InvalidInputError):
        Subject(RevocationKind.KEY, value="x").validate()
