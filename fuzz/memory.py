"""A bound on what an input may make the process allocate."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBoundError(AssertionError):
    """An input made the process allocate more than its size justifies."""


@contextmanager
def bounded_memory(size: int, factor: int, allowance: int) -> Iterator[None]:
    """Raises MemoryBoundError if more than factor·size + allowance bytes are taken at a time. numpy's arrays count."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    yield
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > factor * size + allowance:
        raise MemoryBoundError(f"{taken} bytes for a message of {size}")
