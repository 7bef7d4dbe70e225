from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from tensorguard.store.database import Database
from tests.support.postgresql import postgresql_programs, running_postgresql


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A server of this test run; skipped where none is installed."""
    programs = postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL (initdb) is not installed")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    with running_postgresql(programs) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/attestor.sqlite3"
    server = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(
        server.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return str(server.replace("/postgres?", f"/{name}?"))


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(database_url, tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state directory."""
    made = tmp_path / "state"
    made.mkdir(mode=0o700)
    return made
