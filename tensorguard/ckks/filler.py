"""One thread that fills pools while nothing else wants the processor, and never while somebody waits."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

import structlog

from tensorguard.ckks.idle import ProcessorUse
from tensorguard.ckks.pool import Pool
from tensorguard.errors import UnavailableError

log = structlog.get_logger(__name__)

QUIET_SECONDS = 0.25
"""How long nothing must have been taken from any pool. Calls of one running request come closer together."""
_SLICE_SECONDS = 0.1
"""How long to fill between looks at the processors. A call that begins ends it within one element."""


class Idleness(Protocol):
    """Tells whether the processors were idle since the last look."""

    def idle(self) -> bool:
        """Whether they were, without the work of the thread that asks."""


class Filler:
    """Fills the pools given to it, the emptiest first, and holds at most `max_bytes` over all of them.

    An element is made only if nothing was taken from any of the pools for a quarter of a second and others used at
    most a quarter of the processors in the last look (`ProcessorUse`). Pools are held weakly; closed ones are
    forgotten. The thread is a daemon and starts with the first pool.
    """

    def __init__(self, max_bytes: int, *, quiet_seconds: float = QUIET_SECONDS, use: Idleness | None = None) -> None:
        """Raises ConfigurationError if this machine cannot tell when it is idle."""
        self._max_bytes = max_bytes
        self._quiet = quiet_seconds
        self._use: Idleness = use or ProcessorUse()
        self._pools: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, pool: Pool[Any]) -> None:
        """Fill this pool too, from now on."""
        with self._lock:
            if self._stop.is_set():
                return
            self._pools.add(pool)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="he-pool-filler", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop filling. The pools and what they hold stay as they are: they end with their keys."""
        with self._lock:
            self._stop.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def _run(self) -> None:
        self._use.idle()  # the first look in this thread only begins the accounts
        pause = self._quiet
        while not self._stop.wait(pause):
            pause = 0.0 if self._use.idle() and self._fill_for(_SLICE_SECONDS) else self._quiet

    def _fill_for(self, seconds: float) -> bool:
        """Fill for about this long. False if it ended before: there is nothing to do, or somebody is at work."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pool = self._next()
            if pool is None or self._stop.is_set():
                return False
            try:
                pool.fill()
            except UnavailableError:
                self._forget(pool)  # its key went away
            except Exception as error:  # the thread must live: other pools have other owners
                log.error("pool not filled", error_type=type(error).__name__)
                self._forget(pool)
        return True

    def _next(self) -> Pool[Any] | None:
        """The emptiest pool with room for one more element, if now is the time."""
        with self._lock:
            pools = [pool for pool in self._pools if not pool.closed]
        held = sum(pool.nbytes for pool in pools)
        quiet_since = time.monotonic() - self._quiet
        if any(pool.taken_at > quiet_since for pool in pools):
            return None
        wanting = [pool for pool in pools if len(pool) < pool.capacity and held + pool.element_bytes <= self._max_bytes]
        return min(wanting, key=len, default=None)

    def _forget(self, pool: Pool[Any]) -> None:
        with self._lock:
            self._pools.discard(pool)
