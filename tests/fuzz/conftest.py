"""Fixtures of the replay."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_tracing_afterwards() -> Iterator[None]:
    """The targets trace allocations from their first input on; other tests would be slow under it."""
    yield
    tracemalloc.stop()
