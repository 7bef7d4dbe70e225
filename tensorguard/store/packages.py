"""Content keys of sealed packages, as the attestor that releases them keeps them.

A row per (tenant, package, sequence). The content key in it is wrapped under the key-encryption key; every other column
is authenticated with it, so an edited budget or expiry makes the key unusable.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.exc import IntegrityError

from tensorguard.crypto import canonical
from tensorguard.errors import InvalidInputError, NotFoundError, PackageKeyError, PermissionDeniedError
from tensorguard.package.names import check_name, check_sequence
from tensorguard.store.audit import AuditLog
from tensorguard.store.database import Database
from tensorguard.store.schema import PACKAGES
from tensorguard.store.secrets import Secrets

CONTENT_KEY_BYTES = 32
_MAX_INTEGER = 2**53 - 1
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_KEY_ID = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class RegisteredPackage:
    """One release of an adapter: its identity, its limits and its content key (32 bytes, never shown)."""

    tenant: str
    package_id: str
    sequence: int
    manifest_digest: str
    """SHA-256 of the canonical manifest, hex."""
    key_id: str
    token_budget: int
    """Tokens that all holders of the key together may serve."""
    expires_at: int
    """Unix seconds; the key is not released from then on."""
    registered_at: int
    release_policy_sha256: str
    """Of the only attestor policy that the key is released under, hex; empty for any."""
    content_key: bytes = field(repr=False)


class PackageKeyRegistry:
    """The packages an attestor can release. Safe for threads and processes."""

    def __init__(
        self, database: Database, secrets: Secrets, audit: AuditLog, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._secrets = secrets
        self._audit = audit
        self._clock = clock

    def register(
        self,
        manifest_digest: str,
        tenant: str,
        package_id: str,
        sequence: int,
        key_id: str,
        content_key: bytes,
        token_budget: int,
        expires: int,
        release_policy_sha256: str = "",
    ) -> RegisteredPackage:
        """Store the content key of a release, with an audit record. Storing the same release again changes nothing.

        Raises InvalidInputError for malformed values and PermissionDeniedError when the sequence is lower
        than the newest one of this package (rollback) or is taken by another manifest.
        """
        record = RegisteredPackage(
            tenant=check_name(tenant, "tenant"),
            package_id=check_name(package_id, "package id"),
            sequence=check_sequence(sequence),
            manifest_digest=_check_hex(manifest_digest, _DIGEST, "manifest digest"),
            key_id=_check_hex(key_id, _KEY_ID, "key id"),
            token_budget=_check_positive(token_budget, "token budget"),
            expires_at=_check_positive(expires, "expiry"),
            registered_at=int(self._clock()),
            release_policy_sha256=release_policy_sha256
            and _check_hex(release_policy_sha256, _DIGEST, "release policy hash"),
            content_key=content_key,
        )
        if not isinstance(content_key, bytes) or len(content_key) != CONTENT_KEY_BYTES:
            raise InvalidInputError(f"a content key has {CONTENT_KEY_BYTES} bytes")
        if (stored := self._same(record)) is not None:
            return stored
        with self._audit.recording("register", _public_columns(record)) as connection:
            newest = newest_sequence(connection, tenant, package_id)
            if _select(connection, tenant, package_id, sequence) is not None:
                raise PermissionDeniedError(
                    f"sequence {sequence} of {tenant}/{package_id} is taken by another manifest; "
                    f"use a sequence above {newest}"
                )
            if newest is not None and sequence < newest:
                raise PermissionDeniedError(
                    f"sequence {sequence} of {tenant}/{package_id} is older than the newest one; "
                    f"use a sequence above {newest}"
                )
            wrapped = self._secrets.wrap(connection, content_key, _context(record))
            try:
                connection.execute(PACKAGES.insert().values(**_public_columns(record), wrapped_key=wrapped))
            except IntegrityError:
                raise PermissionDeniedError("this manifest digest or key id belongs to another package") from None
        return record

    def lookup(self, tenant: str, package_id: str, sequence: int, manifest_digest: str) -> RegisteredPackage:
        """The release with exactly this identity. The caller checks `expires_at` and `newest_sequence`.

        Raises NotFoundError when any part differs from what was registered, in the same words whatever is there:
        nobody learns of another tenant's packages. Raises PackageKeyError when the row was edited.
        """
        with self._database.reading() as connection:
            row = _select(connection, tenant, package_id, sequence)
            if row is None or row.manifest_digest != manifest_digest:
                raise NotFoundError(
                    f"no package {tenant}/{package_id} with sequence {sequence} and this manifest is registered"
                )
            return self._unwrap(connection, row)

    def newest_sequence(self, tenant: str, package_id: str) -> int | None:
        """The highest registered sequence of a package, None when there is none."""
        with self._database.reading() as connection:
            return newest_sequence(connection, tenant, package_id)

    def _same(self, record: RegisteredPackage) -> RegisteredPackage | None:
        with self._database.reading() as connection:
            row = _select(connection, record.tenant, record.package_id, record.sequence)
            if row is None:
                return None
            stored = self._unwrap(connection, row)
        identity = (record.manifest_digest, record.content_key)
        return stored if (stored.manifest_digest, stored.content_key) == identity else None

    def _unwrap(self, connection: Connection, row: Row[Any]) -> RegisteredPackage:
        sealed = _sealed(row)
        try:
            key = self._secrets.unwrap(connection, row.wrapped_key, _context(sealed))
        except PackageKeyError as error:
            raise PackageKeyError(f"{sealed.tenant}/{sealed.package_id}: {error.message}") from None
        return replace(sealed, content_key=key)


def newest_sequence(connection: Connection, tenant: str, package_id: str) -> int | None:
    """The highest registered sequence of a package, None when there is none."""
    newest: int | None = connection.execute(
        select(func.max(PACKAGES.c.sequence)).where(PACKAGES.c.tenant == tenant, PACKAGES.c.package_id == package_id)
    ).scalar()
    return newest


def rewrap_packages(connection: Connection, old: Secrets, new: Secrets) -> int:
    """Wrap every content key anew; how many. Raises PackageKeyError when a row was edited."""
    rows = connection.execute(select(PACKAGES)).all()
    for row in rows:
        context = _context(_sealed(row))
        again = new.key.wrap(old.key.unwrap(row.wrapped_key, context), context)
        connection.execute(update(PACKAGES).where(PACKAGES.c.key_id == row.key_id).values(wrapped_key=again))
    return len(rows)


def _select(connection: Connection, tenant: str, package_id: str, sequence: int) -> Row[Any] | None:
    return connection.execute(
        select(PACKAGES).where(
            PACKAGES.c.tenant == check_name(tenant, "tenant"),
            PACKAGES.c.package_id == check_name(package_id, "package id"),
            PACKAGES.c.sequence == check_sequence(sequence),
        )
    ).first()


def _sealed(row: Row[Any]) -> RegisteredPackage:
    columns = {name: value for name, value in row._mapping.items() if name != "wrapped_key"}
    return RegisteredPackage(**columns, content_key=b"")


def _public_columns(record: RegisteredPackage) -> dict[str, str | int]:
    return {item.name: getattr(record, item.name) for item in fields(record) if item.name != "content_key"}


def _context(record: RegisteredPackage) -> bytes:
    return canonical.dumps(["tssp-registry/v2", *_public_columns(record).values()])


def _check_hex(value: str, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise InvalidInputError(f"{what} is not lower-case hex of the right length")
    return value


def _check_positive(value: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INTEGER:
        raise InvalidInputError(f"{what} must be an integer from 1 to 2^53 - 1, not {value!r:.40}")
    return value
