"""Leases on package keys and the token budgets behind them, in SQLite.

Tokens are charged to the release when they are granted, never when they are used, and are not given back:
whatever crashes or lies, all leases of a release together never get more than its budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensorguard.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    InvalidInputError,
    LeaseExpiredError,
    NotFoundError,
    PermissionDeniedError,
)
from tensorguard.evidence.release import LeaseTerms, Release

_KEEP_SECONDS = 24 * 3600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS budgets (
    tenant TEXT NOT NULL, package_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    granted INTEGER NOT NULL CHECK (granted >= 0),
    PRIMARY KEY (tenant, package_id, sequence)
) STRICT;
CREATE TABLE IF NOT EXISTS leases (
    lease_id TEXT PRIMARY KEY,
    token_id TEXT NOT NULL,
    holder TEXT NOT NULL,
    tenant TEXT NOT NULL, package_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    manifest_digest TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    granted INTEGER NOT NULL,
    used INTEGER NOT NULL,
    UNIQUE (token_id, tenant, package_id, sequence)
) STRICT;
CREATE TABLE IF NOT EXISTS renewals (
    request TEXT PRIMARY KEY,
    lease_id TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    granted INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a grant may not exceed."""

    lease_seconds: int
    tokens_per_grant: int
    tokens_per_release: int
    not_after: int
    """Unix seconds at which the package itself expires."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it stands."""

    terms: LeaseTerms
    release: Release
    holder: str
    """Thumbprint of the attested key."""
    tokens_used: int


class LeaseBook:
    """All leases of an attestor. Safe for threads and processes: every change is one transaction."""

    def __init__(self, path: Path) -> None:
        """Open or make the database. Raises ConfigurationError."""
        self._path = path
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self._connect() as connection:
            connection.executescript(_SCHEMA)

    def open_lease(
        self, release: Release, *, token_id: str, holder: str, tokens_wanted: int, limits: Limits, now: int
    ) -> LeaseTerms:
        """A lease for this token and release: the one it has, or a new one charged to the release's budget.

        Raises BudgetExhaustedError when nothing is left and LeaseExpiredError when the token's lease is over.
        """
        if tokens_wanted < 1:
            raise InvalidInputError("tokens_wanted must be at least 1")
        key = (release.tenant, release.package_id, release.sequence)
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT * FROM leases WHERE token_id = ? AND tenant = ? AND package_id = ? AND sequence = ?",
                (token_id, *key),
            ).fetchone()
            if row is not None:
                lease = _lease(row)
                if lease.holder != holder or lease.release != release:
                    raise PermissionDeniedError("this token's lease is for another key or manifest")
                _check_running(lease, now)
                return lease.terms
            granted = _charge(connection, key, min(tokens_wanted, limits.tokens_per_grant), limits)
            if granted == 0:
                raise BudgetExhaustedError(
                    f"the token budget of {release.tenant}/{release.package_id} sequence {release.sequence} "
                    "is spent; pack a new sequence with a new budget"
                )
            terms = LeaseTerms(secrets.token_urlsafe(16), _end(now, limits), granted)
            connection.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    terms.lease_id,
                    token_id,
                    holder,
                    *key,
                    release.manifest_digest.hex(),
                    terms.expires_at,
                    granted,
                ),
            )
            return terms

    def renew(
        self,
        lease_id: str,
        *,
        tokens_used: int,
        tokens_wanted: int,
        request_nonce: bytes,
        limits: Limits,
        now: int,
    ) -> LeaseTerms:
        """Extend a running lease and grant up to `tokens_wanted` more. Repeating a request changes nothing.

        Raises LeaseExpiredError, BudgetExhaustedError (all granted tokens are used and none are left), or
        InvalidInputError for a count that goes down or exceeds what was granted.
        """
        request = hashlib.sha256(lease_id.encode() + b"\x00" + request_nonce).hexdigest()
        with self._transaction() as connection:
            lease = self._select(connection, lease_id)
            _check_running(lease, now)
            answered = connection.execute("SELECT * FROM renewals WHERE request = ?", (request,)).fetchone()
            if answered is not None:
                return LeaseTerms(lease_id, answered["expires_at"], answered["granted"])
            if not lease.tokens_used <= tokens_used <= lease.terms.tokens_granted:
                raise InvalidInputError(
                    f"{tokens_used} tokens used is not between {lease.tokens_used}, reported before, and "
                    f"{lease.terms.tokens_granted}, granted"
                )
            release = lease.release
            key = (release.tenant, release.package_id, release.sequence)
            more = _charge(connection, key, min(tokens_wanted, limits.tokens_per_grant), limits)
            granted = lease.terms.tokens_granted + more
            if tokens_used == granted:
                raise BudgetExhaustedError(
                    f"the token budget of {release.tenant}/{release.package_id} sequence {release.sequence} "
                    "is spent; pack a new sequence with a new budget"
                )
            terms = LeaseTerms(lease_id, _end(now, limits), granted)
            connection.execute(
                "UPDATE leases SET expires_at = ?, granted = ?, used = ? WHERE lease_id = ?",
                (terms.expires_at, granted, tokens_used, lease_id),
            )
            connection.execute(
                "INSERT INTO renewals VALUES (?, ?, ?, ?)",
                (request, lease_id, terms.expires_at, granted),
            )
            # Past their leases' end they cannot be replayed. The budgets, which must never go down, stay.
            connection.execute("DELETE FROM renewals WHERE expires_at < ?", (now - _KEEP_SECONDS,))
            connection.execute("DELETE FROM leases WHERE expires_at < ?", (now - _KEEP_SECONDS,))
            return terms

    def find(self, lease_id: str) -> Lease:
        """The lease, running or not. Raises NotFoundError."""
        with self._connect() as connection:
            return self._select(connection, lease_id)

    def granted(self, tenant: str, package_id: str, sequence: int) -> int:
        """Tokens granted so far to all leases of a release."""
        with self._connect() as connection:
            return _granted(connection, (tenant, package_id, sequence))

    @staticmethod
    def _select(connection: sqlite3.Connection, lease_id: str) -> Lease:
        row = connection.execute("SELECT * FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
        if row is None:
            raise NotFoundError("there is no such lease; release the key again")
        return _lease(row)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"cannot use {self._path}: {error}") from None
        finally:
            connection.close()  # rolls an open transaction back


def _lease(row: sqlite3.Row) -> Lease:
    return Lease(
        LeaseTerms(row["lease_id"], row["expires_at"], row["granted"]),
        Release(row["tenant"], row["package_id"], row["sequence"], bytes.fromhex(row["manifest_digest"])),
        row["holder"],
        row["used"],
    )


def _check_running(lease: Lease, now: int) -> None:
    if now >= lease.terms.expires_at:
        raise LeaseExpiredError("the lease is over; attest again and release the key again")


def _end(now: int, limits: Limits) -> int:
    return min(now + limits.lease_seconds, limits.not_after)


def _granted(connection: sqlite3.Connection, key: tuple[str, str, int]) -> int:
    row = connection.execute(
        "SELECT granted FROM budgets WHERE tenant = ? AND package_id = ? AND sequence = ?", key
    ).fetchone()
    return int(row["granted"]) if row is not None else 0


def _charge(connection: sqlite3.Connection, key: tuple[str, str, int], wanted: int, limits: Limits) -> int:
    """Charge up to `wanted` tokens to a release; how many it were."""
    before = _granted(connection, key)
    amount = max(0, min(wanted, limits.tokens_per_release - before))
    connection.execute(
        "INSERT INTO budgets VALUES (?, ?, ?, ?) "
        "ON CONFLICT (tenant, package_id, sequence) DO UPDATE SET granted = excluded.granted",
        (*key, before + amount),
    )
    return amount
