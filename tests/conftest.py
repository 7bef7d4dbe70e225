from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from tests.support.postgresql import postgresql_programs, running_postgresql


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """What one test configures of structlog must not reach the next one."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A server of this test run; skipped where none is installed."""
    programs = postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL (initdb) is not installed")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    with running_postgresql(programs) as url:
        yield url
