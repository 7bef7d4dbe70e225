"""The attestor's signing keys: ES256, wrapped. One signs; the one before verifies until its tokens have ended.

A new key is announced before it signs: relying parties, which ask for the key set once a minute, know it by then, and
those that pin keys can be told. Every key is kept for good, to verify the audit records that it signed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, select, update

from tensorguard.crypto import canonical
from tensorguard.errors import ConfigurationError, PackageKeyError
from tensorguard.evidence.keys import AttestorKey, KeySet
from tensorguard.evidence.policy import MAX_TOKEN_LIFE_SECONDS
from tensorguard.store.database import Database
from tensorguard.store.schema import SIGNING_KEYS
from tensorguard.store.secrets import Secrets

RETIRED_SECONDS = 2 * MAX_TOKEN_LIFE_SECONDS
"""How long a key verifies after it has signed its last token: longer than that lives, whatever the clocks say."""
LOOK_SECONDS = 5.0
"""How often a running attestor looks for keys that another process made."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key and when it begins to sign (Unix seconds)."""

    key: AttestorKey
    signs_from: int


class SigningKeys:
    """The keys of one database, as of a few seconds ago. Safe for threads."""

    def __init__(self, database: Database, secrets: Secrets, *, clock: Callable[[], float] = time.time) -> None:
        """Make the first key of a new database. Raises PackageKeyError for an edited row."""
        self._database = database
        self._secrets = secrets
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock()
        with database.writing() as connection:
            self._keys = _load(connection, secrets, ()) or [_create(connection, secrets, int(clock()), int(clock()))]

    @property
    def current(self) -> AttestorKey:
        """The key that signs now."""
        now = self._clock()
        keys = self._fresh()
        return next((item.key for item in reversed(keys) if item.signs_from <= now), keys[0].key)

    def valid(self) -> KeySet:
        """The keys that verify tokens now: the one that signs, announced ones, and those retired a while ago."""
        now = self._clock()
        keys = self._fresh()
        ends = [later.signs_from + RETIRED_SECONDS for later in keys[1:]]
        retired = sum(end <= now for end in ends)
        return _key_set(keys[retired:])

    def ever(self) -> KeySet:
        """All keys, for audit records."""
        return _key_set(self._fresh())

    def rotate(self, connection: Connection, signs_from: int) -> AttestorKey:
        """Announce a new key that signs from then on. Raises ConfigurationError while one is announced already."""
        now = int(self._clock())
        with self._lock:
            self._keys = _load(connection, self._secrets, self._keys)
            if len(self._keys) > 1 and self._keys[-1].signs_from > now:
                raise ConfigurationError(
                    f"the key {self._keys[-1].key.thumbprint} is announced and does not sign yet; wait until it does"
                )
            made = _create(connection, self._secrets, now, max(signs_from, self._keys[-1].signs_from + 1))
            self._looked_at = float("-inf")  # look again, once this is committed
        return made.key

    def _fresh(self) -> list[SigningKey]:
        with self._lock:
            now = self._clock()
            if not 0 <= now - self._looked_at < LOOK_SECONDS:
                with self._database.reading() as connection:
                    self._keys = _load(connection, self._secrets, self._keys)
                self._looked_at = now
            return self._keys


def rewrap_signing_keys(connection: Connection, old: Secrets, new: Secrets) -> int:
    """Wrap every key anew; how many."""
    rows = connection.execute(select(SIGNING_KEYS.c.thumbprint, SIGNING_KEYS.c.wrapped_key)).all()
    for thumbprint, wrapped in rows:
        context = _context(thumbprint)
        again = new.key.wrap(old.key.unwrap(wrapped, context), context)
        connection.execute(
            update(SIGNING_KEYS).where(SIGNING_KEYS.c.thumbprint == thumbprint).values(wrapped_key=again)
        )
    return len(rows)


def _load(connection: Connection, secrets: Secrets, known: Sequence[SigningKey]) -> list[SigningKey]:
    """All keys, the first to sign first. Only those that are not known yet are unwrapped."""
    present = {item.key.thumbprint: item.key for item in known}
    rows = connection.execute(select(SIGNING_KEYS).order_by(SIGNING_KEYS.c.signs_from, SIGNING_KEYS.c.thumbprint))
    return [
        SigningKey(
            present.get(row.thumbprint) or _open(secrets.unwrap(connection, row.wrapped_key, _context(row.thumbprint))),
            row.signs_from,
        )
        for row in rows
    ]


def _create(connection: Connection, secrets: Secrets, now: int, signs_from: int) -> SigningKey:
    key = AttestorKey.generate()
    der = key.private_key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    connection.execute(
        SIGNING_KEYS.insert().values(
            thumbprint=key.thumbprint,
            created_at=now,
            wrapped_key=secrets.wrap(connection, der, _context(key.thumbprint)),
            signs_from=signs_from,
        )
    )
    return SigningKey(key, signs_from)


def _open(der: bytes) -> AttestorKey:
    private = serialization.load_der_private_key(der, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise PackageKeyError("the attestor's signing key is not an elliptic-curve key")
    return AttestorKey(private)


def _key_set(keys: Sequence[SigningKey]) -> KeySet:
    return KeySet(item.key.private_key.public_key() for item in keys)


def _context(thumbprint: str) -> bytes:
    return canonical.dumps(["tssp-signing-key/v1", thumbprint])
