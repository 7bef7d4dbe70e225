"""The attestor's database: SQLite by default, PostgreSQL by URL, through SQLAlchemy.

Writing transactions happen one at a time, over all processes that share the database (BEGIN IMMEDIATE in SQLite,
an advisory lock in PostgreSQL): no decision is ever made on what another one is about to change, and the audit log has
one order.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.store import schema

FILE_NAME = "attestor.sqlite3"
_WAIT_SECONDS = 10
_ADVISORY_LOCK = 0x7465_6E73_6166_65  # "tensafe"; any number will do that nobody else takes in this database


class Database:
    """A database with the schema of this version. Safe for threads and processes."""

    def __init__(self, url: URL) -> None:
        """Connect, make or migrate the tables.

        Raises ConfigurationError for a URL of another kind of database, a file that is none, or a schema that is newer
        than this version; UnavailableError when the server cannot be reached.
        """
        self.url = url
        self._alone = threading.Lock()
        self._engine = _engine(url)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        try:
            with self.writing() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, url: str | None, directory: Path) -> Database:
        """The database at `url`, or the file `attestor.sqlite3` in `directory`. Raises as `__init__` does."""
        return cls(_sqlite_url(directory / FILE_NAME) if url is None else _parse(url))

    @property
    def name(self) -> str:
        """What messages call it: the URL without its password."""
        return (self.url.database or "") if self.is_sqlite else self.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writing one overlaps: committed at the block's end, undone when it raises."""
        with self._alone, self._connected() as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees one state of the database."""
        with self._connected() as connection:
            connection = connection.execution_options(
                **({"sqlite_read": True} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"})
            )
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except OperationalError as error:
            raise UnavailableError(f"cannot use the database {self.name}: {_first_line(error)}") from None
        except DBAPIError as error:
            raise ConfigurationError(f"cannot use the database {self.name}: {_first_line(error)}") from None


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError(
            "the database URL is malformed; write sqlite:////PATH or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigurationError("the database URL names no file; write sqlite:////PATH")
        return _sqlite_url(Path(parsed.database))
    if backend != "postgresql":
        raise ConfigurationError(f"{backend} databases are not supported; use a sqlite or postgresql URL")
    return parsed.set(drivername="postgresql+psycopg")


def _sqlite_url(path: Path) -> URL:
    return URL.create("sqlite", database=str(path.resolve()))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return sqlalchemy.create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=24)
        except ModuleNotFoundError:
            raise ConfigurationError("PostgreSQL needs its driver: pip install 'tensafe[postgresql]'") from None
    assert url.database is not None
    try:
        # Made with its final mode: SQLite itself would apply the umask only.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(url.database, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise ConfigurationError(f"cannot make {url.database}: {error.strerror}") from None
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": _WAIT_SECONDS}, pool_size=8, max_overflow=24)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where this module says so
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("sqlite_read")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _migrate(connection: Connection) -> None:
    if _present_version(connection) == schema.VERSION:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, schema.VERSION)
    except CommandError:
        raise ConfigurationError(
            f"the database has schema {_present_version(connection)}, which this version does not know: it was used "
            "with a newer version of TenSafe; run that one"
        ) from None


def _present_version(connection: Connection) -> str | None:
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
