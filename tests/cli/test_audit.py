from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tensorguard.cli.audit import app
from tensorguard.evidence.audit import AuditLog
from tensorguard.evidence.keys import AttestorKey

KEY = AttestorKey.generate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    for number in range(3):
        log.append("attest", {"number": number})
    log.close()
    (tmp_path / "keys.json").write_bytes(KEY.key_set().to_jwks())
    return tmp_path / "audit.jsonl"


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, result.output


def test_unchanged(path: Path) -> None:
    code, output = verify(str(path), "--keys", str(path.parent / "keys.json"), "--json")
    assert code == 0
    report = json.loads(output)
    assert (report["verified"], report["records"], report["signatures"]) == (True, 3, "checked")
    assert "not checked" in verify(str(path))[1]


def test_changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"number":1', b'"number":9'))
    code, output = verify(str(path))
    assert code == 3
    assert "record 2" in output


def test_other_keys(path: Path) -> None:
    (path.parent / "keys.json").write_bytes(AttestorKey.generate().key_set().to_jwks())
    assert verify(str(path), "--keys", str(path.parent / "keys.json"))[0] == 3


def test_cut_short(path: Path) -> None:
    head = json.loads(path.read_text().splitlines()[-1])["hash"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    path.with_suffix(".head").unlink()
    assert verify(str(path))[0] == 0
    assert verify(str(path), "--head", f"3:{head}")[0] == 3


@pytest.mark.parametrize("extra", [["--head", "x"], ["--keys", "nowhere.json"]])
def test_usage_errors(path: Path, extra: list[str]) -> None:
    assert verify(str(path), *extra)[0] == 2


def test_missing_log(tmp_path: Path) -> None:
    assert verify(str(tmp_path / "nowhere"))[0] == 3
