"""Revocations: what may no longer get, renew or keep a package key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, or_, select

from tensorguard.errors import InvalidInputError, RevokedError, TokenError
from tensorguard.evidence.release import Release
from tensorguard.package.names import check_name, check_sequence
from tensorguard.store.schema import ATTESTATIONS, ATTESTED_VALUES, PACKAGES, REVOCATIONS

_KEEP_SECONDS = 24 * 3600
_NOTE_CHARACTERS = 200


class RevocationKind(str, Enum):
    """What a revocation names."""

    PACKAGE = "package"
    """Every version of a package."""
    VERSION = "version"
    """One sequence of a package."""
    KEY = "key"
    """A content key, by its key id."""
    WORKLOAD = "workload"
    """An attested key, by its RFC 7638 thumbprint."""
    MEASUREMENT = "measurement"
    """Code, by the value of any of its registers."""
    CHIP = "chip"
    """A machine, by the id its evidence has."""


_VALUES = {
    RevocationKind.KEY: re.compile(r"[0-9a-f]{32}\Z"),
    RevocationKind.WORKLOAD: re.compile(r"[A-Za-z0-9_-]{43}\Z"),
    RevocationKind.MEASUREMENT: re.compile(r"(?:[0-9a-f]{2}){32,64}\Z"),
    RevocationKind.CHIP: re.compile(r"(?:[0-9a-f]{2}){8,64}\Z"),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is revoked. Fields that its kind does not use are empty or 0."""

    kind: RevocationKind
    tenant: str = ""
    package_id: str = ""
    sequence: int = 0
    value: str = ""

    def validate(self) -> None:
        """Raises InvalidInputError unless exactly the fields of the kind are there and well formed."""
        if self.kind in (RevocationKind.PACKAGE, RevocationKind.VERSION):
            check_name(self.tenant, "tenant")
            check_name(self.package_id, "package id")
            if self.kind is RevocationKind.VERSION:
                check_sequence(self.sequence)
        elif not _VALUES[self.kind].match(self.value):
            raise InvalidInputError(f"this is not how a {self.kind.value} is named: {_HOW_NAMED[self.kind]}")
        elif self.kind is RevocationKind.MEASUREMENT and not self.value.strip("0"):
            # Any register counts, and most workloads have one that is not in use.
            raise InvalidInputError("registers that are not in use are zero: name the value of the code's own register")


_HOW_NAMED = {
    RevocationKind.KEY: "32 lower-case hex digits (`tensafe inspect` shows the key id)",
    RevocationKind.WORKLOAD: "the base64url thumbprint of its signing key, 43 characters (`holder` in the audit log)",
    RevocationKind.MEASUREMENT: "the register's value in lower-case hex, 32 to 64 bytes",
    RevocationKind.CHIP: "the chip id in lower-case hex, 8 to 64 bytes",
}


@dataclass(frozen=True, slots=True)
class Revocation:
    """A revocation as it is on record."""

    number: int
    """Counts up from 1 in the order of revocation."""
    subject: Subject
    note: str
    revoked_at: int
    """Unix seconds."""


def revoke(connection: Connection, subject: Subject, note: str, now: int) -> Revocation:
    """Put `subject` on record; a repetition gives the record that is there. Raises InvalidInputError."""
    subject.validate()
    if len(note) > _NOTE_CHARACTERS or not note.isprintable():
        raise InvalidInputError(f"a note has at most {_NOTE_CHARACTERS} printable characters")
    present = connection.execute(select(REVOCATIONS).where(_is(subject))).first()
    if present is not None:
        return _revocation(present)
    number = (connection.execute(select(func.max(REVOCATIONS.c.number))).scalar() or 0) + 1
    connection.execute(
        REVOCATIONS.insert().values(
            number=number,
            kind=subject.kind.value,
            tenant=subject.tenant,
            package_id=subject.package_id,
            sequence=subject.sequence,
            value=subject.value,
            note=note,
            revoked_at=now,
        )
    )
    return Revocation(number, subject, note, now)


def revocations(connection: Connection, *, after: int = 0) -> list[Revocation]:
    """Those behind number `after`, in order."""
    rows = connection.execute(select(REVOCATIONS).where(REVOCATIONS.c.number > after).order_by(REVOCATIONS.c.number))
    return [_revocation(row) for row in rows]


def check_release_not_revoked(connection: Connection, release: Release, key_id: str) -> None:
    """Raises RevokedError when the package, this version of it or its key is revoked."""
    version = release.tenant, release.package_id, release.sequence
    _refuse_any(
        connection,
        [
            Subject(RevocationKind.PACKAGE, *version[:2]),
            Subject(RevocationKind.VERSION, *version),
            Subject(RevocationKind.KEY, value=key_id),
        ],
    )


def check_package_not_revoked(connection: Connection, tenant: str, package_id: str) -> None:
    """Raises RevokedError when all versions of the package are revoked."""
    _refuse_any(connection, [Subject(RevocationKind.PACKAGE, tenant, package_id)])


def check_workload_not_revoked(
    connection: Connection, holder: str, measurements: Iterable[str], chips: Iterable[str]
) -> None:
    """Raises RevokedError when the attested key, a measurement or the chip is revoked."""
    _refuse_any(
        connection,
        [
            Subject(RevocationKind.WORKLOAD, value=holder),
            *(Subject(RevocationKind.MEASUREMENT, value=value) for value in measurements),
            *(Subject(RevocationKind.CHIP, value=value) for value in chips),
        ],
    )


def keep_attestation(
    connection: Connection,
    token_id: str,
    holder: str,
    tenant: str,
    measurements: Iterable[str],
    chips: Iterable[str],
    *,
    expires_at: int,
    now: int,
) -> None:
    """Remember what a token rests on for as long as a lease may, so that a later revocation finds it."""
    past = select(ATTESTATIONS.c.token_id).where(ATTESTATIONS.c.expires_at < now - _KEEP_SECONDS)
    connection.execute(delete(ATTESTED_VALUES).where(ATTESTED_VALUES.c.token_id.in_(past)))
    connection.execute(delete(ATTESTATIONS).where(ATTESTATIONS.c.expires_at < now - _KEEP_SECONDS))
    connection.execute(
        ATTESTATIONS.insert().values(token_id=token_id, holder=holder, tenant=tenant, expires_at=expires_at)
    )
    values = {
        *((RevocationKind.MEASUREMENT, value) for value in measurements),
        *((RevocationKind.CHIP, value) for value in chips),
    }
    for kind, value in values:
        connection.execute(ATTESTED_VALUES.insert().values(token_id=token_id, kind=kind.value, value=value))


def check_token_not_revoked(connection: Connection, token_id: str, holder: str) -> None:
    """Raises RevokedError when what the token rests on is revoked by now, TokenError when that is not on record."""
    known = connection.execute(select(ATTESTATIONS.c.holder).where(ATTESTATIONS.c.token_id == token_id)).scalar()
    if known != holder:
        raise TokenError("the attestor has no record of this token; attest again")
    rows = connection.execute(
        select(ATTESTED_VALUES.c.kind, ATTESTED_VALUES.c.value).where(ATTESTED_VALUES.c.token_id == token_id)
    ).all()
    _refuse_any(
        connection,
        [
            Subject(RevocationKind.WORKLOAD, value=holder),
            *(Subject(RevocationKind(row.kind), value=row.value) for row in rows),
        ],
    )


def holders_of(connection: Connection, subject: Subject, tenant: str) -> list[str]:
    """Thumbprints of the tenant's workloads that a revocation of a workload, measurement or chip concerns."""
    query = select(ATTESTATIONS.c.holder).where(ATTESTATIONS.c.tenant == tenant)
    if subject.kind is RevocationKind.WORKLOAD:
        query = query.where(ATTESTATIONS.c.holder == subject.value)
    else:
        query = query.join(ATTESTED_VALUES, ATTESTED_VALUES.c.token_id == ATTESTATIONS.c.token_id).where(
            ATTESTED_VALUES.c.kind == subject.kind.value, ATTESTED_VALUES.c.value == subject.value
        )
    return list(connection.execute(query.distinct().order_by(ATTESTATIONS.c.holder)).scalars())


def release_of_key(connection: Connection, key_id: str) -> tuple[str, str, int] | None:
    """Tenant, package and sequence that a content key belongs to."""
    row = connection.execute(
        select(PACKAGES.c.tenant, PACKAGES.c.package_id, PACKAGES.c.sequence).where(PACKAGES.c.key_id == key_id)
    ).first()
    return None if row is None else (row.tenant, row.package_id, row.sequence)


def _refuse_any(connection: Connection, subjects: list[Subject]) -> None:
    found = connection.execute(
        select(REVOCATIONS).where(or_(*(_is(subject) for subject in subjects))).order_by(REVOCATIONS.c.number).limit(1)
    ).first()
    if found is not None:
        kind = found.kind
        raise RevokedError(f"this {kind} was revoked; ask whoever runs the attestor", f"{kind}_revoked")


def _is(subject: Subject) -> Any:
    return and_(
        REVOCATIONS.c.kind == subject.kind.value,
        REVOCATIONS.c.tenant == subject.tenant,
        REVOCATIONS.c.package_id == subject.package_id,
        REVOCATIONS.c.sequence == subject.sequence,
        REVOCATIONS.c.value == subject.value,
    )


def _revocation(row: Row[Any]) -> Revocation:
    subject = Subject(RevocationKind(row.kind), row.tenant, row.package_id, row.sequence, row.value)
    return Revocation(row.number, subject, row.note, row.revoked_at)
