"""The schema, its migrations, and that writing transactions are alone."""

from __future__ import annotations

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import insert, select, text, update

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.store import schema
from tensorguard.store.database import FILE_NAME, Database
from tensorguard.store.schema import SETTINGS, TABLES


def test_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    with database.reading() as connection:
        inspector = sqlalchemy.inspect(connection)
        assert set(inspector.get_table_names()) == {*TABLES, "alembic_version"}
        for name, table in TABLES.items():
            made = {column["name"]: column for column in inspector.get_columns(name)}
            assert list(made) == [column.name for column in table.columns], name
            for column in table.columns:
                assert not made[column.name]["nullable"], f"{name}.{column.name}"
                kind = made[column.name]["type"].python_type
                assert kind is column.type.python_type, f"{name}.{column.name} is {kind}"


def test_opening_again_changes_nothing(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(insert(SETTINGS).values(name="a", value="b"))
    again = Database(database.url)
    with again.reading() as connection:
        assert connection.execute(select(SETTINGS)).all() == [("a", "b")]
    again.close()


def test_a_newer_schema_is_refused(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match=r"schema 9999.*newer version"):
        Database(database.url)


def test_a_writing_transaction_that_raises_changes_nothing(database: Database) -> None:
    with pytest.raises(ValueError, match="x"), database.writing() as connection:
        connection.execute(insert(SETTINGS).values(name="a", value="b"))
        raise ValueError("x")
    with database.reading() as connection:
        assert connection.execute(select(SETTINGS)).all() == []


def test_writing_transactions_are_alone(database: Database) -> None:
    """Read, add, write from many threads of two pools: without a lock, some additions would be lost."""
    with database.writing() as connection:
        connection.execute(insert(SETTINGS).values(name="n", value="0"))
    pools = [database, Database(database.url)]

    def add(number: int) -> None:
        with pools[number % 2].writing() as connection:
            value = int(connection.execute(select(SETTINGS.c.value)).scalar_one())
            connection.execute(update(SETTINGS).values(value=str(value + 1)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(100)))
    with database.reading() as connection:
        assert connection.execute(select(SETTINGS.c.value)).scalar() == "100"
    pools[1].close()


def test_many_may_make_it_at_once(database_url: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as threads:
        opened = list(threads.map(lambda _: Database.open(database_url, tmp_path), range(6)))
    for database in opened:
        database.close()


def test_files_are_private(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert database.name == str(tmp_path / FILE_NAME)
    database.close()


def test_a_commit_waits_for_the_disk(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    with database.writing() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL"
    database.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://localhost/x", "mysql databases are not supported"),
        ("nonsense", "malformed"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_other_urls_are_refused(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Database.open(url, tmp_path)


def test_a_server_that_is_not_there_is_unavailable_and_the_password_is_not_told(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UnavailableError, match="cannot use the database") as refused:
        Database.open("postgresql://user:hunter2@127.0.0.1:1/none", tmp_path)
    assert "hunter2" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigurationError, match="cannot use"):
        Database.open(None, tmp_path)


def test_the_schema_version_is_the_newest_migration() -> None:
    folder = Path(schema.__file__).parent / "migrations" / "versions"
    newest = max(path.stem for path in folder.glob("v*.py"))
    assert newest.startswith(f"v{schema.VERSION}_")


def test_sqlite_rejects_a_negative_budget(tmp_path: Path) -> None:
    Database.open(None, tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO budgets VALUES ('t', 'p', 1, -1)")
