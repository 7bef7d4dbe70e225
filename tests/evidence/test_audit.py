from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tensorguard.crypto import canonical
from tensorguard.errors import ConfigurationError, InternalError
from tensorguard.evidence import audit
from tensorguard.evidence.audit import AuditError, AuditHead, AuditLog, verify_audit_log
from tensorguard.evidence.keys import AttestorKey

KEY = AttestorKey.generate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "audit.jsonl", KEY, clock=lambda: 1000.5)
    for number in range(5):
        log.append("attest", {"number": number})
    log.close()
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_what_is_written_verifies(path: Path) -> None:
    head = verify_audit_log(path, KEY.key_set())
    assert head.records == 5
    assert head.hash == json.loads(lines(path)[-1])["hash"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_chain_goes_on_after_a_restart(path: Path) -> None:
    log = AuditLog(path, KEY)
    log.append("attest", {"number": 5})
    log.close()
    assert verify_audit_log(path, KEY.key_set()).records == 6


def test_every_edit_is_found(path: Path) -> None:
    original = path.read_bytes()
    for position in range(0, len(original), 7):
        mutated = bytearray(original)
        mutated[position] ^= 1
        path.write_bytes(bytes(mutated))
        with pytest.raises(AuditError):
            verify_audit_log(path, KEY.key_set())


@pytest.mark.parametrize("index", range(5))
def test_every_deletion_is_found(path: Path, index: int) -> None:
    kept = lines(path)
    del kept[index]
    path.write_bytes(b"".join(kept))
    with pytest.raises(AuditError):
        verify_audit_log(path)


def test_reorder_insertion_and_duplication_are_found(path: Path) -> None:
    a, b, c, d, e = lines(path)
    for order in ([a, c, b, d, e], [a, b, c, e, d], [a, a, b, c, d, e], [a, b, c, d, e, e], [e]):
        path.write_bytes(b"".join(order))
        with pytest.raises(AuditError):
            verify_audit_log(path)


def test_a_record_of_another_history_is_found(path: Path, tmp_path: Path) -> None:
    """Signed by the same key at the same place, in a copy of the state directory: no part of this chain."""
    other = AuditLog(tmp_path / "other.jsonl", KEY)
    for _ in range(5):
        other.append("attest", {"number": 99})
    other.close()
    path.write_bytes(b"".join([*lines(path)[:4], lines(tmp_path / "other.jsonl")[4]]))
    path.with_suffix(".head").unlink()
    with pytest.raises(AuditError, match="record 5"):
        verify_audit_log(path, KEY.key_set())


def test_truncation_is_found_by_the_head_file_or_a_remembered_head(path: Path) -> None:
    remembered = verify_audit_log(path)
    path.write_bytes(b"".join(lines(path)[:3]))
    with pytest.raises(AuditError, match="cut short"):
        verify_audit_log(path)
    with pytest.raises(AuditError):
        AuditLog(path, KEY)
    path.with_suffix(".head").unlink()
    assert verify_audit_log(path).records == 3
    with pytest.raises(AuditError, match="cut short"):
        verify_audit_log(path, expected=remembered)
    with pytest.raises(AuditError):
        verify_audit_log(path, expected=AuditHead(2, "0" * 64))


def test_a_new_chain_without_the_key_is_found(path: Path) -> None:
    """Somebody who can write both files, but has no key, makes a consistent chain."""
    forger = AttestorKey.generate()
    path.unlink()
    path.with_suffix(".head").unlink()
    log = AuditLog(path, forger)
    log.append("attest", {})
    log.close()
    assert verify_audit_log(path).records == 1, "without the key the chain itself is consistent"
    with pytest.raises(AuditError, match="not this attestor's"):
        verify_audit_log(path, KEY.key_set())
    record = json.loads(lines(path)[0])
    record["key"] = KEY.thumbprint
    record["hash"] = audit._digest(record).hex()
    path.write_bytes(canonical.dumps(record) + b"\n")
    path.with_suffix(".head").unlink()
    with pytest.raises(AuditError, match="signature"):
        verify_audit_log(path, KEY.key_set())


def test_a_write_torn_by_a_crash_is_dropped(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"event":"att')
    log = AuditLog(path, KEY)
    log.append("attest", {"number": 5})
    log.close()
    assert verify_audit_log(path, KEY.key_set()).records == 6


def test_a_record_that_is_not_on_disk_is_not_recorded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path, KEY)

    def full(_descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InternalError):
        log.append("attest", {})
    monkeypatch.undo()
    with pytest.raises(InternalError, match="closed"):
        log.append("attest", {})
    log.close()


def test_sync_comes_before_the_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path, KEY)
    on_disk: list[int] = []
    sync = os.fsync

    def record_sync(descriptor: int) -> None:
        sync(descriptor)
        on_disk.append(path.stat().st_size)

    monkeypatch.setattr(os, "fsync", record_sync)
    log.append("attest", {})
    log.close()
    assert on_disk == [path.stat().st_size]


def test_one_process_at_a_time(path: Path) -> None:
    log = AuditLog(path, KEY)
    with pytest.raises(ConfigurationError, match="another attestor"):
        AuditLog(path, KEY)
    log.close()
    AuditLog(path, KEY).close()


def test_own_fields_cannot_be_overridden(path: Path) -> None:
    log = AuditLog(path, KEY)
    with pytest.raises(InternalError):
        log.append("attest", {"previous": "0" * 64})
    log.close()


@pytest.mark.parametrize("line", [b"x\n", b"[]\n", b"{}\n", b'{"a":1}', b"[" * 100 + b"\n", b" " * 9000 + b"\n"])
def test_garbage_is_an_error(path: Path, line: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(line)
    with pytest.raises(AuditError, match="record 6"):
        verify_audit_log(path)
