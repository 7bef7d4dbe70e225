"""The authority that certifies services: one a database, its key wrapped like every other secret."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, select, update

from tensorguard.crypto import canonical
from tensorguard.errors import PackageKeyError
from tensorguard.rpc.certificates import Authority
from tensorguard.store.schema import AUTHORITY
from tensorguard.store.secrets import Secrets


def load_or_create_authority(connection: Connection, secrets: Secrets, now: int) -> Authority:
    """The database's authority, made where there is none. Raises PackageKeyError for an edited row."""
    row = connection.execute(select(AUTHORITY)).first()
    if row is None:
        return _create(connection, secrets, now)
    key = serialization.load_der_private_key(
        secrets.unwrap(connection, row.wrapped_key, _context(row.certificate)), None
    )
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PackageKeyError("the authority's key is not an elliptic-curve key")
    return Authority(key, x509.load_der_x509_certificate(row.certificate))


def rewrap_authority(connection: Connection, old: Secrets, new: Secrets) -> int:
    """Wrap its key anew; how many there are."""
    row = connection.execute(select(AUTHORITY)).first()
    if row is None:
        return 0
    context = _context(row.certificate)
    again = new.key.wrap(old.key.unwrap(row.wrapped_key, context), context)
    connection.execute(update(AUTHORITY).values(wrapped_key=again))
    return 1


def _create(connection: Connection, secrets: Secrets, now: int) -> Authority:
    made = Authority.generate(now)
    certificate = made.certificate.public_bytes(serialization.Encoding.DER)
    key = made.private_key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    connection.execute(
        AUTHORITY.insert().values(
            certificate=certificate,
            created_at=now,
            wrapped_key=secrets.wrap(connection, key, _context(certificate)),
        )
    )
    return made


def _context(certificate: bytes) -> bytes:
    return canonical.dumps(["tssp-authority/v1", certificate.hex()])
