"""The attestor's signing keys: ES256, wrapped. The newest signs; all of them verify what was signed before."""

from __future__ import annotations

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, select, update

from tensorguard.crypto import canonical
from tensorguard.errors import PackageKeyError
from tensorguard.evidence.keys import AttestorKey
from tensorguard.store.schema import SIGNING_KEYS
from tensorguard.store.secrets import Secrets


def load_or_create_keys(connection: Connection, secrets: Secrets, now: int) -> list[AttestorKey]:
    """All signing keys, the newest first; one is made in a new database. Raises PackageKeyError for an edited row."""
    rows = connection.execute(
        select(SIGNING_KEYS).order_by(SIGNING_KEYS.c.created_at.desc(), SIGNING_KEYS.c.thumbprint)
    )
    keys = [_open(secrets.unwrap(connection, row.wrapped_key, _context(row.thumbprint))) for row in rows]
    return keys or [_create(connection, secrets, now)]


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


def _create(connection: Connection, secrets: Secrets, now: int) -> AttestorKey:
    key = AttestorKey.generate()
    der = key.private_key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    connection.execute(
        SIGNING_KEYS.insert().values(
            thumbprint=key.thumbprint,
            created_at=now,
            wrapped_key=secrets.wrap(connection, der, _context(key.thumbprint)),
        )
    )
    return key


def _open(der: bytes) -> AttestorKey:
    private = serialization.load_der_private_key(der, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise PackageKeyError("the attestor's signing key is not an elliptic-curve key")
    return AttestorKey(private)


def _context(thumbprint: str) -> bytes:
    return canonical.dumps(["tssp-signing-key/v1", thumbprint])
