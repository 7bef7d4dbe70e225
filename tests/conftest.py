from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """What one test configures of structlog must not reach the next one."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
