"""Single-use challenges. In the database: any attestor on it can take a nonce that another one made, once."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, func, select

from tensorguard.errors import NonceError, UnavailableError
from tensorguard.store.database import Database
from tensorguard.store.schema import NONCES

NONCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Nonce:
    """A challenge and when it ends (Unix seconds)."""

    value: bytes
    expires_at: int


class NonceStore:
    """Nonces that have been handed out and not come back. Only their hashes are stored."""

    def __init__(
        self,
        database: Database,
        *,
        life_seconds: int = 60,
        capacity: int = 4096,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._life = life_seconds
        self._capacity = capacity
        self._clock = clock

    def create(self) -> Nonce:
        """A new nonce. Raises UnavailableError while too many are pending."""
        now = int(self._clock())
        nonce = Nonce(secrets.token_bytes(NONCE_BYTES), now + self._life)
        with self._database.writing() as connection:
            connection.execute(delete(NONCES).where(NONCES.c.expires_at <= now))
            pending = connection.execute(select(func.count()).select_from(NONCES)).scalar_one()
            if pending >= self._capacity:
                raise UnavailableError("too many challenges are pending; try again in a minute")
            connection.execute(NONCES.insert().values(sha256=_digest(nonce.value), expires_at=nonce.expires_at))
        return nonce

    def consume(self, value: bytes) -> None:
        """Take a nonce out, whatever comes of it. Raises NonceError unless it was pending and in time."""
        expires_at = None
        if len(value) == NONCE_BYTES:
            with self._database.writing() as connection:
                expires_at = connection.execute(
                    delete(NONCES).where(NONCES.c.sha256 == _digest(value)).returning(NONCES.c.expires_at)
                ).scalar()
        if expires_at is None:
            raise NonceError("the nonce is unknown or was used already; ask for a new one")
        if self._clock() >= expires_at:
            raise NonceError("the nonce has expired; ask for a new one and answer it at once")


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
