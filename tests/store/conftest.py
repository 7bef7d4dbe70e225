from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorguard.store.database import Database
from tests.support.postgresql import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/attestor.sqlite3"
    return new_database(request.getfixturevalue("postgresql"))


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
