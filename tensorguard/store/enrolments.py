"""Secrets with which an operator vouches for a service that is not attested. Each is good for one certificate."""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import Connection, delete

from tensorguard.errors import AuthenticationError, ConfigurationError
from tensorguard.rpc.certificates import ServiceName
from tensorguard.store.schema import ENROLMENTS

ENROLLED_ROLES = ("gateway",)
"""Never a role that has to be attested: that would be a way around attestation."""
MAX_SECRET = 64


def create_enrolment(connection: Connection, name: ServiceName, *, expires_at: int) -> str:
    """A new secret, of which only the hash is kept. Raises ConfigurationError for a role that has to be attested."""
    if name.role not in ENROLLED_ROLES:
        raise ConfigurationError(f"services of the role {name.role!r} are attested, not enrolled")
    secret = secrets.token_urlsafe(32)
    connection.execute(
        ENROLMENTS.insert().values(sha256=_digest(secret), role=name.role, tenant=name.tenant, expires_at=expires_at)
    )
    return secret


def use_enrolment(connection: Connection, secret: str, now: int) -> ServiceName:
    """Whom the secret was made for; it is used up. Raises AuthenticationError."""
    connection.execute(delete(ENROLMENTS).where(ENROLMENTS.c.expires_at <= now))
    row = connection.execute(
        delete(ENROLMENTS)
        .where(ENROLMENTS.c.sha256 == _digest(secret[:MAX_SECRET]))
        .returning(ENROLMENTS.c.role, ENROLMENTS.c.tenant)
    ).first()
    # The role again: a row that somebody wrote into the database must not be a way around attestation.
    if row is None or row.role not in ENROLLED_ROLES:
        raise AuthenticationError(
            "the enrolment secret is unknown, was used or has expired: make one with tensafe attestor enrol"
        )
    return ServiceName(row.role, row.tenant)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
