"""Kernel calls split over threads. Kernels run without the interpreter lock, so two cores work at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

MAX_THREADS = 64


@cache
def _pool() -> ThreadPoolExecutor:
    """Shared by all sessions, so that they do not add up; its threads start when they are needed."""
    return ThreadPoolExecutor(MAX_THREADS - 1, "ckks")


os.register_at_fork(after_in_child=_pool.cache_clear)


def split(threads: int, count: int, work: Callable[[int, int], object]) -> None:
    """Call ``work(first, end)`` on at most ``threads`` parts of range(count) at the same time, the first in this
    thread. Raises what a part raised, after all have ended.
    """
    parts = min(threads, count)
    if parts <= 1:
        work(0, count)
        return
    bounds = [count * part // parts for part in range(parts + 1)]
    others = [_pool().submit(work, bounds[part], bounds[part + 1]) for part in range(1, parts)]
    try:
        work(0, bounds[1])
    finally:
        wait(others)
    for other in others:
        other.result()
