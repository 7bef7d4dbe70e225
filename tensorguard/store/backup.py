"""Backup and restoration of a SQLite database. PostgreSQL has its own tools (pg_dump, pg_restore).

A backup holds every secret wrapped: without the key-encryption key, which is not in it, it opens nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tensorguard.errors import ConfigurationError
from tensorguard.store.database import FILE_NAME
from tensorguard.store.state import AttestorState


def back_up(state: AttestorState, output: Path) -> int:
    """Copy the database into a new file (mode 0600) while attestors run; number of the last audit record in it.

    The backup is a record of the audit log, and contains it. Raises ConfigurationError when `output` exists or the
    database is on a server.
    """
    if not state.database.is_sqlite:
        raise ConfigurationError("this database is on a server: back it up with pg_dump")
    with _new_file(output):
        state.audit.append("backup", {"file": output.name[:100]})
        assert state.database.url.database is not None
        _copy(Path(state.database.url.database), output)
    return state.audit.head.records


def restore(backup: Path, directory: Path) -> Path:
    """Put a backup where `directory` has no database; returns the database's path.

    Opening the state then shows whether the backup is the newest state (RollbackError). Raises ConfigurationError when
    there is a database or `backup` is none.
    """
    target = directory / FILE_NAME
    if not backup.is_file():
        raise ConfigurationError(f"there is no backup {backup}")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make state directory {directory}: {error.strerror}") from None
    for path in (target.with_name(f"{FILE_NAME}{suffix}") for suffix in ("-wal", "-shm")):
        if path.exists():  # SQLite would write what is in it into the restored database
            raise ConfigurationError(f"{path} is of the database that was there: move it away with that one")
    with _new_file(target):
        _copy(backup, target)
    return target


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[None]:
    """A file made with mode 0600, which vanishes when the block raises."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise ConfigurationError(f"{path} exists already; it is not overwritten: move it away first") from None
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as read,
        contextlib.closing(sqlite3.connect(target)) as write,
    ):
        try:
            read.backup(write)
            (answer,) = write.execute("PRAGMA integrity_check").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{source} is not a database: {error}") from None
    if answer != "ok":
        raise ConfigurationError(f"{source} is damaged: {answer:.200}")
