"""Secrets in the database: wrapped under the one key-encryption key that the database names."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from tensorguard.errors import ConfigurationError
from tensorguard.store.key_encryption import KeyEncryptionKey
from tensorguard.store.schema import SETTINGS

_SETTING = "key_encryption_key"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Wraps and unwraps within a transaction, in which the key is still the database's."""

    key: KeyEncryptionKey

    def wrap(self, connection: Connection, secret: bytes, context: bytes) -> bytes:
        """Raises ConfigurationError when the database's secrets are wrapped under another key by now."""
        self.check(connection)
        return self.key.wrap(secret, context)

    def unwrap(self, connection: Connection, wrapped: bytes, context: bytes) -> bytes:
        """Raises as `wrap` does, and PackageKeyError when the row was edited."""
        self.check(connection)
        return self.key.unwrap(wrapped, context)

    def check(self, connection: Connection) -> None:
        """Raises ConfigurationError unless this is the key that the database names."""
        named = key_of(connection)
        if named != self.key.id:
            raise ConfigurationError(
                f"the database's secrets are wrapped under the key-encryption key {named}, not {self.key.id}: give "
                "that one (TENSAFE_ATTESTOR_KEY_ENCRYPTION_KEY), and restart attestors after a rotation"
            )


def key_of(connection: Connection) -> str | None:
    """Id of the key that secrets are wrapped under, None in a new database."""
    found: str | None = connection.execute(select(SETTINGS.c.value).where(SETTINGS.c.name == _SETTING)).scalar()
    return found


def name_key(connection: Connection, key: KeyEncryptionKey) -> None:
    """Make `key` the one that secrets are wrapped under."""
    if key_of(connection) is None:
        connection.execute(SETTINGS.insert().values(name=_SETTING, value=key.id))
    else:
        connection.execute(update(SETTINGS).where(SETTINGS.c.name == _SETTING).values(value=key.id))
