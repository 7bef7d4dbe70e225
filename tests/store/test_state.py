"""Opening state: keys at rest and their rotation, a database that was set back, backup and restoration."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tensorguard.errors import ConfigurationError, NotFoundError, PackageKeyError
from tensorguard.evidence.keys import AttestorKey
from tensorguard.store.audit import records_of
from tensorguard.store.audit_head import AuditError, AuditHead, HeadKeeper, RollbackError
from tensorguard.store.backup import back_up, restore
from tensorguard.store.database import FILE_NAME
from tensorguard.store.state import AttestorState, StateLocation

KEY = os.urandom(32)


def register(state: AttestorState, sequence: int = 1) -> None:
    state.packages.register(f"{sequence:064x}", "acme", "law", sequence, f"{sequence:032x}", KEY, 1000, 2_000_000_000)


def content_key(state: AttestorState, sequence: int = 1) -> bytes:
    return state.packages.lookup("acme", "law", sequence, f"{sequence:064x}").content_key


def events(state: AttestorState) -> list[dict[str, Any]]:
    with state.database.reading() as connection:
        return [json.loads(line) for line in records_of(connection)]


def test_a_second_opening_finds_everything(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        thumbprint = state.key.thumbprint
    with AttestorState.open(folder) as state:
        assert state.key.thumbprint == thumbprint
        assert content_key(state) == KEY
        assert [event["event"] for event in events(state)] == ["register"]


def test_no_secret_is_in_any_file(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        private = state.key.private_key.private_numbers().private_value.to_bytes(32, "big")
        for path in folder.iterdir():
            for secret in (KEY, KEY.hex().encode(), private):
                assert secret not in path.read_bytes(), path


def test_works_with_either_database(folder: Path, database_url: str) -> None:
    with AttestorState.open(folder, database_url=database_url) as state:
        register(state)
    with AttestorState.open(folder, database_url=database_url) as state:
        assert content_key(state) == KEY
        assert state.rotate_key_encryption_key(f"file:{folder}/kek2") == 3
    with AttestorState.open(folder, database_url=database_url, key_encryption_key=f"file:{folder}/kek2") as state:
        assert content_key(state) == KEY


def test_a_key_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEK", base64.b64encode(os.urandom(32)).decode())
    with AttestorState.open(folder, key_encryption_key="env:KEK") as state:
        register(state)
    assert not (folder / "kek").exists()
    with AttestorState.open(folder, key_encryption_key="env:KEK") as state:
        assert content_key(state) == KEY


def test_an_edited_signing_key_is_refused(folder: Path) -> None:
    AttestorState.open(folder).close()
    with sqlite3.connect(folder / FILE_NAME) as connection:
        connection.execute("UPDATE signing_keys SET thumbprint = 'x'")
    with pytest.raises(PackageKeyError):
        AttestorState.open(folder)


# Rotation of the key-encryption key


def test_rotation_wraps_everything_anew_and_is_recorded(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        register(state, 2)
        assert state.rotate_key_encryption_key(f"file:{folder}/new") == 4
        assert content_key(state, 2) == KEY
        last = events(state)[-1]
        assert (last["event"], last["secrets"]) == ("rotate_key_encryption_key", 4)
    with pytest.raises(ConfigurationError, match="wrapped under the key-encryption key"):
        AttestorState.open(folder)
    (folder / "kek").unlink()
    with AttestorState.open(folder, key_encryption_key=f"file:{folder}/new") as state:
        assert content_key(state) == content_key(state, 2) == KEY


def test_an_attestor_that_runs_on_with_the_old_key_neither_reads_nor_writes(folder: Path) -> None:
    running = AttestorState.open(folder)
    register(running)
    with AttestorState.open(folder) as state:
        state.rotate_key_encryption_key(f"file:{folder}/new")
    with pytest.raises(ConfigurationError, match="restart attestors after a rotation"):
        content_key(running)
    with pytest.raises(ConfigurationError, match="restart attestors after a rotation"):
        register(running, 2)
    running.close()


def test_a_rotation_that_fails_changes_nothing(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        register(state, 2)
    with sqlite3.connect(folder / FILE_NAME) as connection:
        connection.execute("UPDATE packages SET token_budget = 5 WHERE sequence = 2")
    with AttestorState.open(folder) as state:
        with pytest.raises(PackageKeyError):
            state.rotate_key_encryption_key(f"file:{folder}/new")
        with pytest.raises(ConfigurationError, match="the present key"):
            state.rotate_key_encryption_key(f"file:{folder}/kek")
    with AttestorState.open(folder) as state:
        assert content_key(state) == KEY
        assert "rotate_key_encryption_key" not in [event["event"] for event in events(state)]


# A database that was set back


@pytest.fixture
def set_back(folder: Path, tmp_path: Path) -> Path:
    """State whose database was replaced by an earlier copy of itself."""
    with AttestorState.open(folder) as state:
        register(state)
        back_up(state, tmp_path / "backup")
        register(state, 2)
    (folder / FILE_NAME).unlink()
    restore(tmp_path / "backup", folder)
    return folder


def test_a_database_from_an_old_backup_is_refused(set_back: Path) -> None:
    with pytest.raises(RollbackError, match=r"ends with audit record 2, but record 3 .*accept-rollback") as refused:
        AttestorState.open(set_back)
    assert refused.value.reason == "rollback"


def test_an_operator_can_accept_it_on_record(set_back: Path) -> None:
    with AttestorState(StateLocation(set_back), accept_rollback="disk lost") as state:
        last = events(state)[-1]
        assert (last["event"], last["why"], last["records"]) == ("accept_rollback", "disk lost", 2)
        assert json.loads(last["heads_before"][0])["records"] == 3
    with AttestorState.open(set_back) as state:
        assert content_key(state) == KEY
        with pytest.raises(NotFoundError):
            content_key(state, 2)


def test_another_history_of_the_same_length_is_refused(set_back: Path) -> None:
    head = (set_back / "audit.head").read_bytes()
    with AttestorState(StateLocation(set_back), accept_rollback="try"):
        pass
    (set_back / "audit.head").write_bytes(head)
    with pytest.raises(RollbackError, match="another audit record 3"):
        AttestorState.open(set_back)


def test_a_missing_head_is_refused(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
    (folder / "audit.head").unlink()
    with pytest.raises(RollbackError, match=r"audit\.head is missing"):
        AttestorState.open(folder)


def test_an_empty_database_beside_a_head_is_refused(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
    (folder / FILE_NAME).unlink()
    with pytest.raises(RollbackError, match="signed with a key that the database does not have"):
        AttestorState.open(folder)


def test_a_head_that_was_edited_or_is_no_head_is_refused(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
    path = folder / "audit.head"
    good = path.read_bytes()
    for edited in (good.replace(b'"records":1', b'"records":0'), good[:-1], b"{}", b"", b"x" * 5000):
        path.write_bytes(edited)
        with pytest.raises(AuditError):
            AttestorState.open(folder)
    path.write_bytes(good)
    AttestorState.open(folder).close()


def test_a_crash_between_commit_and_head_is_no_rollback(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        before = (folder / "audit.head").read_bytes()
        register(state, 2)
    (folder / "audit.head").write_bytes(before)
    AttestorState.open(folder).close()


def test_a_witness_notices_when_the_head_was_set_back_too(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "elsewhere"
    with AttestorState.open(folder, witnesses=[witness]) as state:
        register(state)
        back_up(state, tmp_path / "backup")
        head = (folder / "audit.head").read_bytes()
        register(state, 2)
        assert witness.read_bytes() == (folder / "audit.head").read_bytes()
    (folder / FILE_NAME).unlink()
    restore(tmp_path / "backup", folder)
    (folder / "audit.head").write_bytes(head)
    with pytest.raises(RollbackError):
        AttestorState.open(folder, witnesses=[witness])
    AttestorState.open(folder).close()  # nobody knows without it


def test_numbers_in_a_head_file_only_go_up(folder: Path) -> None:
    key, keeper = AttestorKey.generate(), HeadKeeper([folder / "audit.head"])
    keeper.keep(AuditHead(5, "a" * 64), key, 1)
    keeper.keep(AuditHead(4, "b" * 64), key, 2)
    assert keeper.read(key.key_set()) == [AuditHead(5, "a" * 64)]
    keeper.keep(AuditHead(4, "b" * 64), key, 2, lower=True)
    assert keeper.read(key.key_set()) == [AuditHead(4, "b" * 64)]


# Backup


def test_a_restored_newest_backup_is_accepted(folder: Path, tmp_path: Path) -> None:
    with AttestorState.open(folder) as state:
        register(state)
        assert back_up(state, tmp_path / "backup") == 2
    (folder / FILE_NAME).unlink()
    assert restore(tmp_path / "backup", folder).stat().st_mode & 0o077 == 0
    with AttestorState.open(folder) as state:
        assert content_key(state) == KEY


def test_neither_backup_nor_restoration_overwrites(folder: Path, tmp_path: Path) -> None:
    with AttestorState.open(folder) as state:
        back_up(state, tmp_path / "backup")
        with pytest.raises(ConfigurationError, match="exists already"):
            back_up(state, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match="exists already"):
        restore(tmp_path / "backup", folder)
    with pytest.raises(ConfigurationError, match="no backup"):
        restore(tmp_path / "nowhere", folder)


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_what_a_crash_left_of_the_old_database_is_not_written_into_the_new_one(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    with AttestorState.open(folder) as state:
        back_up(state, tmp_path / "backup")
    (folder / FILE_NAME).unlink()
    (folder / f"{FILE_NAME}{suffix}").write_bytes(b"left")
    with pytest.raises(ConfigurationError, match="move it away"):
        restore(tmp_path / "backup", folder)
    assert not (folder / FILE_NAME).exists()
    (folder / f"{FILE_NAME}{suffix}").unlink()
    restore(tmp_path / "backup", folder)


def test_a_file_that_is_no_backup_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "backup").write_bytes(b"x" * 5000)
    with pytest.raises(ConfigurationError, match="is not a database"):
        restore(tmp_path / "backup", folder)
    assert not (folder / FILE_NAME).exists()


def test_a_server_is_backed_up_by_its_own_tools(folder: Path, tmp_path: Path, postgresql: str) -> None:
    with (
        AttestorState.open(folder, database_url=postgresql) as state,
        pytest.raises(ConfigurationError, match="pg_dump"),
    ):
        back_up(state, tmp_path / "backup")
