"""Leases on package keys and the token budgets behind them.

Tokens are charged to the release when they are granted, never when they are used, and are not given back:
whatever crashes or lies, all leases of a release together never get more than its budget.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, delete, select, update

from tensorguard.errors import (
    BudgetExhaustedError,
    InvalidInputError,
    LeaseExpiredError,
    NotFoundError,
    PermissionDeniedError,
)
from tensorguard.evidence.release import LeaseTerms, Release
from tensorguard.store.schema import BUDGETS, LEASES, RENEWALS

_KEEP_SECONDS = 24 * 3600


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


def open_lease(
    connection: Connection,
    release: Release,
    *,
    token_id: str,
    holder: str,
    tokens_wanted: int,
    limits: Limits,
    now: int,
) -> LeaseTerms:
    """A lease for this token and release: the one it has, or a new one charged to the release's budget.

    `connection`: in a writing transaction. Raises BudgetExhaustedError when nothing is left and LeaseExpiredError when
    the token's lease is over.
    """
    if tokens_wanted < 1:
        raise InvalidInputError("tokens_wanted must be at least 1")
    row = connection.execute(select(LEASES).where(LEASES.c.token_id == token_id, _is_of(LEASES, release))).first()
    if row is not None:
        lease = _lease(row)
        if lease.holder != holder or lease.release != release:
            raise PermissionDeniedError("this token's lease is for another key or manifest")
        _check_running(lease, now)
        return lease.terms
    granted = _charge(connection, release, min(tokens_wanted, limits.tokens_per_grant), limits)
    if granted == 0:
        raise _spent(release)
    terms = LeaseTerms(secrets.token_urlsafe(16), _end(now, limits), granted)
    connection.execute(
        LEASES.insert().values(
            lease_id=terms.lease_id,
            token_id=token_id,
            holder=holder,
            tenant=release.tenant,
            package_id=release.package_id,
            sequence=release.sequence,
            manifest_digest=release.manifest_digest.hex(),
            expires_at=terms.expires_at,
            granted=granted,
            used=0,
        )
    )
    return terms


def renew_lease(
    connection: Connection,
    lease_id: str,
    *,
    tokens_used: int,
    tokens_wanted: int,
    request_nonce: bytes,
    limits: Limits,
    now: int,
) -> LeaseTerms:
    """Extend a running lease and grant up to `tokens_wanted` more. Repeating a request changes nothing.

    `connection`: in a writing transaction. Raises LeaseExpiredError, BudgetExhaustedError (all granted tokens are used
    and none are left), or InvalidInputError for a count that goes down or exceeds what was granted.
    """
    request = hashlib.sha256(lease_id.encode() + b"\x00" + request_nonce).hexdigest()
    lease = find_lease(connection, lease_id)
    _check_running(lease, now)
    answered = connection.execute(select(RENEWALS).where(RENEWALS.c.request == request)).first()
    if answered is not None:
        return LeaseTerms(lease_id, answered.expires_at, answered.granted)
    if not lease.tokens_used <= tokens_used <= lease.terms.tokens_granted:
        raise InvalidInputError(
            f"{tokens_used} tokens used is not between {lease.tokens_used}, reported before, and "
            f"{lease.terms.tokens_granted}, granted"
        )
    more = _charge(connection, lease.release, min(tokens_wanted, limits.tokens_per_grant), limits)
    granted = lease.terms.tokens_granted + more
    if tokens_used == granted:
        raise _spent(lease.release)
    terms = LeaseTerms(lease_id, _end(now, limits), granted)
    connection.execute(
        update(LEASES)
        .where(LEASES.c.lease_id == lease_id)
        .values(expires_at=terms.expires_at, granted=granted, used=tokens_used)
    )
    connection.execute(
        RENEWALS.insert().values(request=request, lease_id=lease_id, expires_at=terms.expires_at, granted=granted)
    )
    # Past their leases' end they cannot be replayed. The budgets, which must never go down, stay.
    connection.execute(delete(RENEWALS).where(RENEWALS.c.expires_at < now - _KEEP_SECONDS))
    connection.execute(delete(LEASES).where(LEASES.c.expires_at < now - _KEEP_SECONDS))
    return terms


def find_lease(connection: Connection, lease_id: str) -> Lease:
    """The lease, running or not. Raises NotFoundError."""
    row = connection.execute(select(LEASES).where(LEASES.c.lease_id == lease_id)).first()
    if row is None:
        raise NotFoundError("there is no such lease; release the key again")
    return _lease(row)


def tokens_granted(connection: Connection, release: Release) -> int:
    """Tokens granted so far to all leases of a release."""
    return connection.execute(select(BUDGETS.c.granted).where(_is_of(BUDGETS, release))).scalar() or 0


def _is_of(table: Table, release: Release) -> ColumnElement[bool]:
    return and_(
        table.c.tenant == release.tenant,
        table.c.package_id == release.package_id,
        table.c.sequence == release.sequence,
    )


def _lease(row: Row[Any]) -> Lease:
    return Lease(
        LeaseTerms(row.lease_id, row.expires_at, row.granted),
        Release(row.tenant, row.package_id, row.sequence, bytes.fromhex(row.manifest_digest)),
        row.holder,
        row.used,
    )


def _check_running(lease: Lease, now: int) -> None:
    if now >= lease.terms.expires_at:
        raise LeaseExpiredError("the lease is over; attest again and release the key again")


def _spent(release: Release) -> BudgetExhaustedError:
    return BudgetExhaustedError(
        f"the token budget of {release.tenant}/{release.package_id} sequence {release.sequence} "
        "is spent; pack a new sequence with a new budget"
    )


def _end(now: int, limits: Limits) -> int:
    return min(now + limits.lease_seconds, limits.not_after)


def _charge(connection: Connection, release: Release, wanted: int, limits: Limits) -> int:
    """Charge up to `wanted` tokens to a release; how many it were. No other transaction writes meanwhile."""
    before = tokens_granted(connection, release)
    amount = max(0, min(wanted, limits.tokens_per_release - before))
    changed = connection.execute(update(BUDGETS).where(_is_of(BUDGETS, release)).values(granted=before + amount))
    if changed.rowcount == 0:
        connection.execute(
            BUDGETS.insert().values(
                tenant=release.tenant, package_id=release.package_id, sequence=release.sequence, granted=amount
            )
        )
    return amount
