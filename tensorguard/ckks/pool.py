"""Bounded stores of encryptions of zero that were made before they are needed. Each is used at most once.

An element leaves the pool when it is taken, under a lock, and the pool keeps no reference to it. Nobody can put one
back. Pools are in this process's memory only; a forked child finds them empty and closed, since parent and child
would otherwise use the same elements.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypeVar

from tensorguard.errors import InvalidInputError, UnavailableError
from tensorguard.observability.metrics import HE_POOL_ELEMENTS, HE_POOL_LEVEL

Side = Literal["host", "coprocessor"]


class Element(Protocol):
    """What a pool holds."""

    def wipe(self) -> None:
        """Overwrite what is secret."""


_Element = TypeVar("_Element", bound=Element)


class Pool(Generic[_Element]):
    """First in, first out: elements are taken in the order in which they were made.

    `make` makes one element of `element_bytes` bytes; at most `max_bytes` are held. With less than one element's
    bytes the pool is always empty. Thread-safe.
    """

    def __init__(self, side: Side, make: Callable[[], _Element], element_bytes: int, max_bytes: int) -> None:
        if element_bytes < 1 or max_bytes < 0:
            raise InvalidInputError("a pool needs the size of its elements, and room for none or more")
        self.element_bytes = element_bytes
        self.capacity = max_bytes // element_bytes
        self._make = make
        self._ready: deque[_Element] = deque()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        """Held while an element is made and put: else two threads could put theirs in the wrong order."""
        self._closed = False
        self._taken_at = -math.inf
        self._level_metric = HE_POOL_LEVEL.labels(side)
        self._made, self._taken, self._in_line, self._wiped = (
            HE_POOL_ELEMENTS.labels(side, event) for event in ("made", "taken", "in_line", "wiped")
        )
        _POOLS.add(self)

    def __repr__(self) -> str:
        return f"Pool({len(self)} of {self.capacity})"

    def __reduce__(self) -> str:
        raise TypeError("a pool's elements are used once, so it cannot be copied or pickled")

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return len(self) * self.element_bytes

    @property
    def closed(self) -> bool:
        """Whether it stays empty from now on."""
        return self._closed

    @property
    def taken_at(self) -> float:
        """When elements were last asked for, by `time.monotonic`; -inf before the first time."""
        return self._taken_at

    def take(self, count: int) -> list[_Element]:
        """Up to ``count`` elements, the oldest first. What is missing the caller makes in line."""
        with self._lock:
            self._taken_at = time.monotonic()
            taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        if taken:
            self._level_metric.dec(len(taken))
            self._taken.inc(len(taken))
        if len(taken) < count:
            self._in_line.inc(count - len(taken))
        return taken

    def fill(self) -> bool:
        """Make one element and put it in. False, with nothing made, if the pool is full or closed."""
        with self._making:
            if self._closed or len(self._ready) >= self.capacity:
                return False
            return self._put(self._make())

    def _put(self, element: _Element) -> bool:
        """False, with the element overwritten, if the pool was closed while it was made."""
        self._made.inc()
        with self._lock:
            if not self._closed:
                self._ready.append(element)
                self._level_metric.inc()
                return True
        element.wipe()
        self._wiped.inc()
        return False

    def close(self) -> None:
        """Overwrite what is left. From now on the pool is empty."""
        if left := self._close():
            self._level_metric.dec(left)
            self._wiped.inc(left)

    def _close(self) -> int:
        """The number of elements that were left."""
        with self._lock:
            self._closed = True
            left = list(self._ready)
            self._ready.clear()
        for element in left:
            element.wipe()
        return len(left)

    def _forget_in_child(self) -> None:
        """`close` in a forked child, where locks that other threads held are never released, the metrics' included."""
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._close()


def weakly(make: Callable[[], _Element]) -> Callable[[], _Element]:
    """A bound method that does not keep its object alive: a pool belongs to the key that it makes elements of."""
    method = weakref.WeakMethod(make)

    def call() -> _Element:
        bound = method()
        if bound is None:
            raise UnavailableError("the key of this pool is gone")
        return bound()

    return call


_POOLS: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()


def _forget_pools() -> None:
    for pool in list(_POOLS):
        pool._forget_in_child()


os.register_at_fork(after_in_child=_forget_pools)
