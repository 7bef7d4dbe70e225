"""The audit log: every edit, deletion, reorder and insertion is found, in the database and in an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from tensorguard.crypto import canonical
from tensorguard.errors import InternalError
from tensorguard.evidence.keys import AttestorKey
from tensorguard.store import audit
from tensorguard.store.audit import AuditLog, records_in_file, records_of, verify_newest, verify_records
from tensorguard.store.audit_head import AuditError, AuditHead, HeadKeeper, RollbackError
from tensorguard.store.database import Database
from tensorguard.store.schema import AUDIT, SETTINGS

KEY = AttestorKey.generate()


@pytest.fixture(autouse=True)
def log(database: Database) -> AuditLog:
    made = AuditLog(database, KEY, HeadKeeper([]), clock=lambda: 1000.5)
    for number in range(5):
        made.append("attest", {"number": number})
    return made


@pytest.fixture
def lines(database: Database) -> list[bytes]:
    with database.reading() as connection:
        return list(records_of(connection))


def test_what_is_written_verifies(log: AuditLog, lines: list[bytes]) -> None:
    head = verify_records(lines, KEY.key_set())
    assert head == log.head == AuditHead(5, json.loads(lines[-1])["hash"])
    assert [json.loads(line)["number"] for line in lines] == list(range(5))


def test_records_are_read_in_pages(database: Database, lines: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 5, 6):
        monkeypatch.setattr(audit, "_PAGE", size)
        with database.reading() as connection:
            assert list(records_of(connection)) == lines
            assert list(records_of(connection, after=3)) == lines[3:]


def test_a_database_that_is_set_back_while_it_is_used_takes_no_more_records(database: Database, log: AuditLog) -> None:
    """However long it has grown again meanwhile."""
    with database.writing() as connection:
        connection.execute(delete(AUDIT).where(AUDIT.c.record > 3))
    with pytest.raises(RollbackError, match="ends with audit record 3, but record 5 was written before"):
        log.append("attest", {})
    other = AuditLog(database, KEY, HeadKeeper([]), clock=lambda: 2000.0)
    for number in range(4):
        other.append("attest", {"number": number})
    with pytest.raises(RollbackError, match="another audit record 5"):
        log.append("attest", {})
    assert log.head == other.head == AuditHead(7, other.head.hash)


def test_two_processes_continue_one_chain(database: Database) -> None:
    other = Database(database.url)
    logs = [AuditLog(item, KEY, HeadKeeper([])) for item in (database, other)]
    for number in range(6):
        logs[number % 2].append("attest", {"number": number})
    with database.reading() as connection:
        assert verify_records(records_of(connection), KEY.key_set()).records == 11
    other.close()


def test_every_edit_is_found(lines: list[bytes]) -> None:
    for index, line in enumerate(lines):
        for position in range(0, len(line), 3):
            changed = bytearray(line)
            changed[position] ^= 1
            with pytest.raises(AuditError):
                verify_records([*lines[:index], bytes(changed), *lines[index + 1 :]], KEY.key_set())


def test_every_deletion_before_the_end_is_found(lines: list[bytes]) -> None:
    for index in range(4):
        with pytest.raises(AuditError, match=f"record {index + 1}"):
            verify_records(lines[:index] + lines[index + 1 :])


def test_reorder_insertion_and_duplication_are_found(lines: list[bytes]) -> None:
    a, b, c, d, e = lines
    for order in ([a, c, b, d, e], [a, b, c, e, d], [a, a, b, c, d, e], [a, b, c, d, e, e], [e]):
        with pytest.raises(AuditError):
            verify_records(order)


def test_a_cut_end_is_found_by_a_head_that_was_seen(lines: list[bytes], log: AuditLog) -> None:
    assert verify_records(lines[:3]).records == 3
    with pytest.raises(AuditError, match="cut short"):
        verify_records(lines[:3], seen=[log.head])
    with pytest.raises(AuditError, match="cut short or replaced"):
        verify_records(lines, seen=[AuditHead(2, "0" * 64)])
    assert verify_records(lines, seen=[AuditHead(2, json.loads(lines[1])["hash"]), log.head]) == log.head


def test_edits_in_the_database_are_found(database: Database, lines: list[bytes]) -> None:
    edits = [
        update(AUDIT).where(AUDIT.c.record == 2).values(line=lines[1].decode().replace('"number":1', '"number":9')),
        delete(AUDIT).where(AUDIT.c.record == 3),
        update(AUDIT).where(AUDIT.c.record == 4).values(line=lines[4].decode()),
    ]
    for edit in edits:
        with pytest.raises(AuditError), database.writing() as connection:
            connection.execute(edit)
            verify_newest(connection, KEY.key_set())


def test_the_newest_alone_can_be_verified(database: Database, lines: list[bytes]) -> None:
    with database.reading() as connection:
        assert verify_newest(connection, KEY.key_set(), 2).records == 5
    with pytest.raises(AuditError, match="record 4"), database.writing() as connection:
        connection.execute(update(AUDIT).where(AUDIT.c.record == 3).values(hash="0" * 64))
        verify_newest(connection, KEY.key_set(), 2)


def test_a_new_chain_without_the_key_is_found(lines: list[bytes]) -> None:
    """Somebody who can write the database, but has no key, makes a consistent chain."""
    record = json.loads(lines[0]) | {"number": 99}
    record["hash"] = audit._digest(record).hex()
    assert verify_records([canonical.dumps(record)]).records == 1, "without the key the chain itself is consistent"
    with pytest.raises(AuditError, match="signature"):
        verify_records([canonical.dumps(record)], KEY.key_set())
    record["key"] = AttestorKey.generate().thumbprint
    record["hash"] = audit._digest(record).hex()
    with pytest.raises(AuditError, match="not this attestor's"):
        verify_records([canonical.dumps(record)], KEY.key_set())


def test_a_change_and_its_record_are_one(database: Database, log: AuditLog) -> None:
    with pytest.raises(ValueError, match="no"), log.recording("attest", {}) as connection:
        connection.execute(SETTINGS.insert().values(name="a", value="b"))
        raise ValueError("no")
    with pytest.raises(InternalError), log.recording("attest", {"large": "x" * 9000}) as connection:
        connection.execute(SETTINGS.insert().values(name="a", value="b"))
    with database.reading() as connection:
        assert connection.execute(select(SETTINGS)).all() == []
    assert log.head.records == 5


def test_fields_are_read_at_the_end(log: AuditLog, database: Database) -> None:
    fields = {"count": 0}
    with log.recording("attest", fields):
        fields["count"] = 7
    with database.reading() as connection:
        assert json.loads(list(records_of(connection))[-1])["count"] == 7


def test_the_head_is_kept_before_recording_ends(database: Database, tmp_path: Path) -> None:
    missing = HeadKeeper([tmp_path / "nowhere" / "audit.head"])
    with pytest.raises(InternalError, match="cannot be written"):
        AuditLog(database, KEY, missing).append("attest", {})


def test_own_fields_cannot_be_overridden(log: AuditLog) -> None:
    with pytest.raises(InternalError, match="reserved"):
        log.append("attest", {"previous": "0" * 64})


@pytest.mark.parametrize("line", [b"x", b"[]", b"{}", b'{"a": 1}', b"[" * 100, b" " * 9000, b'{"a":1.5}'])
def test_garbage_is_an_error(lines: list[bytes], line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(b"\n".join([*lines, line, b""]))
    with pytest.raises(AuditError, match="record 6"):
        verify_records(records_in_file(path))


def test_an_export_verifies_like_the_database(lines: list[bytes], tmp_path: Path, log: AuditLog) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(b"\n".join([*lines, b""]))
    assert verify_records(records_in_file(path), KEY.key_set()) == log.head
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(AuditError, match="record 5 is cut off"):
        verify_records(records_in_file(path))
    with pytest.raises(AuditError, match="cannot read"):
        verify_records(records_in_file(tmp_path / "nowhere"))
