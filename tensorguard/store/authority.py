"""The authority that certifies services: its key is wrapped like every other secret.

A new one is announced before it issues, so that every service can be told to trust it; the one before is trusted until
the certificates that it issued have ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, delete, select, update

from tensorguard.crypto import canonical
from tensorguard.errors import ConfigurationError, PackageKeyError
from tensorguard.rpc.certificates import MAX_AUTHORITIES, Authority
from tensorguard.store.database import Database
from tensorguard.store.schema import AUTHORITY
from tensorguard.store.secrets import Secrets
from tensorguard.store.signing_keys import LOOK_SECONDS


@dataclass(frozen=True, slots=True)
class Term:
    """An authority, when it begins to issue, and from when on those before it are not trusted (Unix seconds)."""

    authority: Authority
    issues_from: int
    alone_from: int


class Authorities:
    """The authorities of one database, as of a few seconds ago. Safe for threads."""

    def __init__(self, database: Database, secrets: Secrets, *, clock: Callable[[], float] = time.time) -> None:
        """Make the first one of a new database. Raises PackageKeyError for an edited row."""
        self._database = database
        self._secrets = secrets
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock()
        with database.writing() as connection:
            now = int(clock())
            self._terms = _load(connection, secrets, ()) or [_create(connection, secrets, now, now, now)]

    @property
    def current(self) -> Authority:
        """The one that issues now."""
        now = self._clock()
        terms = self._trusted(now)
        return next((term.authority for term in reversed(terms) if term.issues_from <= now), terms[0].authority)

    def trusted(self) -> tuple[Authority, ...]:
        """Those whose certificates are good now, the oldest first: one, or in a rotation the new one as well."""
        return tuple(term.authority for term in self._trusted(self._clock()))

    @property
    def pem(self) -> bytes:
        """Their certificates: what every service is given to know its peers by."""
        return b"".join(authority.pem for authority in self.trusted())

    def rotate(self, connection: Connection, issues_from: int, alone_from: int) -> Authority:
        """Announce a new one that issues from then on, and is trusted alone from `alone_from`; keys of those that are
        not trusted any more are removed. Raises ConfigurationError while one is announced already.
        """
        now = int(self._clock())
        with self._lock:
            self._terms = _load(connection, self._secrets, self._terms)
            newest, trusted = self._terms[-1], _trusted(self._terms, now)
            if len(self._terms) > 1 and newest.issues_from > now:
                raise ConfigurationError("a new authority is announced and does not issue yet; wait until it does")
            if len(trusted) == MAX_AUTHORITIES:
                raise ConfigurationError(f"{MAX_AUTHORITIES} authorities are trusted still; wait until one has retired")
            for term in self._terms[: len(self._terms) - len(trusted)]:
                connection.execute(delete(AUTHORITY).where(AUTHORITY.c.certificate == _der(term.authority)))
            begins = max(issues_from, newest.issues_from + 1)
            made = _create(connection, self._secrets, now, begins, max(alone_from, begins))
            self._looked_at = float("-inf")  # look again, once this is committed
        return made.authority

    def _trusted(self, now: float) -> Sequence[Term]:
        with self._lock:
            if not 0 <= now - self._looked_at < LOOK_SECONDS:
                with self._database.reading() as connection:
                    self._terms = _load(connection, self._secrets, self._terms)
                self._looked_at = now
            return _trusted(self._terms, now)


def rewrap_authorities(connection: Connection, old: Secrets, new: Secrets) -> int:
    """Wrap every key anew; how many."""
    rows = connection.execute(select(AUTHORITY.c.certificate, AUTHORITY.c.wrapped_key)).all()
    for certificate, wrapped in rows:
        context = _context(certificate)
        again = new.key.wrap(old.key.unwrap(wrapped, context), context)
        connection.execute(update(AUTHORITY).where(AUTHORITY.c.certificate == certificate).values(wrapped_key=again))
    return len(rows)


def _trusted(terms: Sequence[Term], now: float) -> Sequence[Term]:
    return terms[max((place for place, term in enumerate(terms) if term.alone_from <= now), default=0) :]


def _load(connection: Connection, secrets: Secrets, known: Sequence[Term]) -> list[Term]:
    """All of them, the first to issue first. Only keys that are not known yet are unwrapped."""
    present = {_der(term.authority): term.authority for term in known}
    rows = connection.execute(select(AUTHORITY).order_by(AUTHORITY.c.issues_from))
    return [
        Term(
            present.get(row.certificate)
            or _open(row.certificate, secrets.unwrap(connection, row.wrapped_key, _context(row.certificate))),
            row.issues_from,
            row.alone_from,
        )
        for row in rows
    ]


def _create(connection: Connection, secrets: Secrets, now: int, issues_from: int, alone_from: int) -> Term:
    made = Authority.generate(now)
    certificate = _der(made)
    key = made.private_key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    connection.execute(
        AUTHORITY.insert().values(
            certificate=certificate,
            created_at=now,
            wrapped_key=secrets.wrap(connection, key, _context(certificate)),
            issues_from=issues_from,
            alone_from=alone_from,
        )
    )
    return Term(made, issues_from, alone_from)


def _open(certificate: bytes, der: bytes) -> Authority:
    key = serialization.load_der_private_key(der, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PackageKeyError("the authority's key is not an elliptic-curve key")
    return Authority(key, x509.load_der_x509_certificate(certificate))


def _der(authority: Authority) -> bytes:
    return authority.certificate.public_bytes(serialization.Encoding.DER)


def _context(certificate: bytes) -> bytes:
    return canonical.dumps(["tssp-authority/v1", certificate.hex()])
