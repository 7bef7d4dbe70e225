"""Content keys of sealed packages, as the attestor that releases them keeps them.

One SQLite file `packages.sqlite3` in the attestor's state directory holds a row per (tenant, package,
sequence). The content key in it is wrapped with AES-256-GCM under the key-encryption key in the file `kek`;
every other column is additional authenticated data, so an edited budget or expiry makes the key unusable.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tensorguard.crypto.files import read_secret_file, write_secret_file
from tensorguard.errors import (
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    PackageKeyError,
    PermissionDeniedError,
)
from tensorguard.package.names import check_name, check_sequence

CONTENT_KEY_BYTES = 32
_NONCE_BYTES = 12
_MAX_INTEGER = 2**53 - 1
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_KEY_ID = re.compile(r"[0-9a-f]{32}\Z")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS packages (
    tenant TEXT NOT NULL,
    package_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    manifest_digest TEXT NOT NULL UNIQUE,
    key_id TEXT NOT NULL UNIQUE,
    token_budget INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    registered_at INTEGER NOT NULL,
    wrapped_key BLOB NOT NULL,
    PRIMARY KEY (tenant, package_id, sequence)
) STRICT
"""


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
    content_key: bytes = field(repr=False)


class PackageKeyRegistry:
    """The packages an attestor can release. Safe for threads and processes: each call opens the database."""

    def __init__(self, state_dir: Path | str) -> None:
        """Open the registry in `state_dir`, making it on first use.

        Raises ConfigurationError when the key-encryption key is missing beside a database that needs it, or
        when others can read it.
        """
        self._directory = Path(state_dir)
        self._database = self._directory / "packages.sqlite3"
        self._kek_file = self._directory / "kek"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make state directory {state_dir}: {error.strerror}") from None
        self._kek = self._open_kek()
        if not self._database.exists():
            # Made with its final mode: SQLite itself would apply the umask only.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._database, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self._connect() as connection:
            connection.execute(_SCHEMA)

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
    ) -> RegisteredPackage:
        """Store the content key of a release. Storing the same release again changes nothing.

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
            registered_at=int(time.time()),
            content_key=content_key,
        )
        if not isinstance(content_key, bytes) or len(content_key) != CONTENT_KEY_BYTES:
            raise InvalidInputError(f"a content key has {CONTENT_KEY_BYTES} bytes")
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            present = self._select(connection, tenant, package_id, sequence)
            if present is not None:
                stored = self._unwrap(present)
                if stored.manifest_digest == record.manifest_digest and stored.content_key == content_key:
                    return stored
                raise PermissionDeniedError(
                    f"sequence {sequence} of {tenant}/{package_id} is taken by another manifest; "
                    f"use a sequence above {self._newest(connection, tenant, package_id)}"
                )
            newest = self._newest(connection, tenant, package_id)
            if newest is not None and sequence < newest:
                raise PermissionDeniedError(
                    f"sequence {sequence} of {tenant}/{package_id} is older than the newest one; "
                    f"use a sequence above {newest}"
                )
            nonce = os.urandom(_NONCE_BYTES)
            wrapped = nonce + AESGCM(self._kek).encrypt(nonce, content_key, _associated_data(record))
            try:
                connection.execute(
                    "INSERT INTO packages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*_public_columns(record), wrapped),
                )
            except sqlite3.IntegrityError:
                raise PermissionDeniedError("this manifest digest or key id belongs to another package") from None
            connection.execute("COMMIT")
        return record

    def lookup(self, tenant: str, package_id: str, sequence: int, manifest_digest: str) -> RegisteredPackage:
        """The release with exactly this identity. The caller checks `expires_at` and `newest_sequence`.

        Raises NotFoundError when any part differs from what was registered, PackageKeyError when the row was
        edited or the key-encryption key is another one.
        """
        with self._connect() as connection:
            row = self._select(connection, tenant, package_id, sequence)
        if row is None or row["manifest_digest"] != manifest_digest:
            raise NotFoundError(
                f"no package {tenant}/{package_id} with sequence {sequence} and this manifest is registered"
            )
        return self._unwrap(row)

    def newest_sequence(self, tenant: str, package_id: str) -> int | None:
        """The highest registered sequence of a package, None when there is none."""
        with self._connect() as connection:
            return self._newest(connection, tenant, package_id)

    def _open_kek(self) -> bytes:
        if not self._kek_file.exists():
            if self._database.exists():
                raise ConfigurationError(
                    f"{self._kek_file} is missing, without which no key in {self._database} opens; restore it"
                )
            with contextlib.suppress(ConfigurationError):  # another process may have been faster
                write_secret_file(self._kek_file, os.urandom(32))
        key = read_secret_file(self._kek_file)
        if len(key) != 32:
            raise ConfigurationError(f"{self._kek_file} does not hold a 32-byte key")
        return key

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._database, timeout=10, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"cannot use {self._database}: {error}") from None
        finally:
            connection.close()  # rolls an open transaction back

    @staticmethod
    def _select(connection: sqlite3.Connection, tenant: str, package_id: str, sequence: int) -> sqlite3.Row | None:
        row: sqlite3.Row | None = connection.execute(
            "SELECT * FROM packages WHERE tenant = ? AND package_id = ? AND sequence = ?",
            (check_name(tenant, "tenant"), check_name(package_id, "package id"), check_sequence(sequence)),
        ).fetchone()
        return row

    @staticmethod
    def _newest(connection: sqlite3.Connection, tenant: str, package_id: str) -> int | None:
        (newest,) = connection.execute(
            "SELECT MAX(sequence) FROM packages WHERE tenant = ? AND package_id = ?", (tenant, package_id)
        ).fetchone()
        return None if newest is None else int(newest)

    def _unwrap(self, row: sqlite3.Row) -> RegisteredPackage:
        columns = {name: row[name] for name in row.keys() if name != "wrapped_key"}  # noqa: SIM118 - a Row iterates values
        sealed = RegisteredPackage(**columns, content_key=b"")
        wrapped = bytes(row["wrapped_key"])
        try:
            key = AESGCM(self._kek).decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _associated_data(sealed))
        except (InvalidTag, ValueError):
            raise PackageKeyError(
                f"the stored key of {sealed.tenant}/{sealed.package_id} cannot be opened: "
                f"{self._database} was edited or {self._kek_file} is another key"
            ) from None
        return RegisteredPackage(**columns, content_key=key)


def _public_columns(record: RegisteredPackage) -> tuple[str | int, ...]:
    return (
        record.tenant,
        record.package_id,
        record.sequence,
        record.manifest_digest,
        record.key_id,
        record.token_budget,
        record.expires_at,
        record.registered_at,
    )


def _associated_data(record: RegisteredPackage) -> bytes:
    return json.dumps(["tssp-registry/v1", *_public_columns(record)], separators=(",", ":")).encode()


def _check_hex(value: str, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise InvalidInputError(f"{what} is not lower-case hex of the right length")
    return value


def _check_positive(value: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INTEGER:
        raise InvalidInputError(f"{what} must be an integer from 1 to 2^53 - 1, not {value!r:.40}")
    return value
