"""Single-use challenges."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tensorguard.errors import NonceError, UnavailableError

NONCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Nonce:
    """A challenge and when it ends (Unix seconds)."""

    value: bytes
    expires_at: int


class NonceStore:
    """Nonces that have been handed out and not come back. In memory: a restart refuses all earlier ones."""

    def __init__(self, *, life_seconds: int = 60, capacity: int = 4096, clock: Callable[[], float] = time.time) -> None:
        self._life = life_seconds
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[bytes, int] = {}  # in order of expiry, as every nonce lives equally long

    def create(self) -> Nonce:
        """A new nonce. Raises UnavailableError while too many are pending."""
        now = self._clock()
        with self._lock:
            self._forget(now)
            if len(self._pending) >= self._capacity:
                raise UnavailableError("too many challenges are pending; try again in a minute")
            nonce = Nonce(secrets.token_bytes(NONCE_BYTES), int(now) + self._life)
            self._pending[nonce.value] = nonce.expires_at
            return nonce

    def consume(self, value: bytes) -> None:
        """Take a nonce out, whatever comes of it. Raises NonceError unless it was pending and in time."""
        with self._lock:
            expires_at = self._pending.pop(value, None) if len(value) == NONCE_BYTES else None
        if expires_at is None:
            raise NonceError("the nonce is unknown or was used already; ask for a new one")
        if self._clock() >= expires_at:
            raise NonceError("the nonce has expired; ask for a new one and answer it at once")

    def _forget(self, now: float) -> None:
        for value, expires_at in list(self._pending.items()):
            if expires_at > now:
                break
            del self._pending[value]
