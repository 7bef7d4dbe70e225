"""The CKKS keys of one link: the current one, the one before, whose answers may be on their way, and the next."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from tensorguard.ckks.host import HostSession
from tensorguard.errors import TenSafeError, UnavailableError

log = structlog.get_logger(__name__)

Group = tuple[str, int, str]
"""Adapter, layer and group."""
_AHEAD = 0.75
"""Share of a key's rows after which the next key is made, so that its pools are warm when it is needed."""


@dataclass(slots=True, eq=False)
class LinkKey:
    """A CKKS key and the rows that passed through each (adapter, layer, group) under it."""

    number: int
    host: HostSession
    used: Counter[Group] = field(default_factory=Counter)


class KeySchedule:
    """Replaces the key before more than `tokens_per_key` rows of a group passed under it.

    `announce` makes the session's next key and sends its public half; it is never called twice at a time. The first
    call is made here and may raise what it raises. `key_for` is called under the session's lock.
    """

    def __init__(self, announce: Callable[[], LinkKey], tokens_per_key: int) -> None:
        self._announce = announce
        self._tokens_per_key = tokens_per_key
        self._lock = threading.Lock()
        self._closed = False
        self._next: Future[LinkKey] | None = None
        self._keys = [announce()]

    @property
    def current(self) -> LinkKey:
        """The key that the last rows went under."""
        return self._keys[-1]

    def key_for(self, group: Group, tokens: int) -> LinkKey:
        """The key for these rows, counted as used.

        The next key is announced in the background once three quarters of the current one's rows are used. Where the
        current one ends before that is done, this waits for it. Raises what announcing raised.
        """
        key = self.current
        if key.used[group] and key.used[group] + tokens > self._tokens_per_key:
            key = self._switch()
        key.used[group] += tokens
        if key.used[group] >= _AHEAD * self._tokens_per_key:
            self._prepare()
        return key

    def close(self) -> None:
        """Wipe every key, also one that is being made."""
        with self._lock:
            self._closed = True
            upcoming = self._next
        for key in self._keys:
            key.host.close()
        if upcoming is not None and upcoming.done() and upcoming.exception() is None:
            upcoming.result().host.close()

    def _switch(self) -> LinkKey:
        fresh = self._prepare().result()
        self._next = None
        for old in self._keys[:-1]:
            old.host.close()
        self.current.host.pool.close()  # it only decrypts from now on
        self._keys = [self.current, fresh]
        return fresh

    def _prepare(self) -> Future[LinkKey]:
        """The next key, which is made once."""
        with self._lock:
            if self._next is None:
                self._next = Future()
                threading.Thread(
                    target=self._make_next, args=(self._next,), name="he-lora-next-key", daemon=True
                ).start()
            return self._next

    def _make_next(self, upcoming: Future[LinkKey]) -> None:
        try:
            key = self._announce()
        except Exception as error:
            # Not tried again: the coprocessor may have taken the key. The session ends when the current one does.
            reason = error.reason if isinstance(error, TenSafeError) else type(error).__name__
            log.warning("next key not announced", reason=reason)
            upcoming.set_exception(error)
            return
        with self._lock:
            if not self._closed:
                upcoming.set_result(key)
                return
        key.host.close()
        upcoming.set_exception(UnavailableError("the session was closed"))
