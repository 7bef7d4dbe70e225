"""An attestor's state, opened: directory, database, key-encryption key, signing key, audit log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sqlalchemy import select

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.keys import AttestorKey, KeySet
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.store import audit_head
from tensorguard.store.audit import AuditLog, head_of, verify_newest
from tensorguard.store.audit_head import HeadKeeper, RollbackError, check_not_set_back
from tensorguard.store.authority import Authorities, rewrap_authorities
from tensorguard.store.database import Database
from tensorguard.store.enrolments import create_enrolment
from tensorguard.store.key_encryption import open_key_encryption_key
from tensorguard.store.packages import PackageKeyRegistry, rewrap_packages
from tensorguard.store.schema import AUDIT
from tensorguard.store.secrets import Secrets, key_of, name_key
from tensorguard.store.signing_keys import SigningKeys, rewrap_signing_keys

_EARLIER_FILES = ("packages.sqlite3", "leases.sqlite3", "signing-key.pem", "audit.jsonl")


@dataclass(frozen=True, slots=True)
class StateLocation:
    """Where the state is. The attestor and every command on its state must be given the same."""

    directory: Path
    """Of the head file, and of database and key-encryption key where they are not elsewhere; mode 0700."""
    database_url: str | None = None
    """None: the file `attestor.sqlite3` in `directory`."""
    key_encryption_key: str | None = None
    """As `open_key_encryption_key` reads it; None: the file `kek` in `directory`, made for a new database."""
    witnesses: tuple[Path, ...] = ()
    """Further files that keep the audit head, best on another disk or machine."""


class AttestorState:
    """Open state. Close it, or use it as a context."""

    def __init__(
        self, location: StateLocation, *, clock: Callable[[], float] = time.time, accept_rollback: str | None = None
    ) -> None:
        """Open the state, making what a new one needs.

        `accept_rollback`: why an operator accepts a database that was set back; recorded in the audit log.
        Raises ConfigurationError (permissions, wrong key-encryption key, newer schema, state of an earlier version),
        RollbackError when the database is older than a kept head, AuditError when the audit log was changed.
        """
        self.directory = _open_directory(location.directory)
        self._clock = clock
        self.database = Database.open(location.database_url, self.directory)
        try:
            self._secrets = self._open_secrets(location)
            self.keys = SigningKeys(self.database, self._secrets, clock=clock)
            self.key = self.keys.current
            self.authorities = Authorities(self.database, self._secrets, clock=clock)
            self._heads = HeadKeeper([self.directory / audit_head.FILE_NAME, *location.witnesses])
            self.audit = AuditLog(self.database, self.key, self._heads, clock=clock)
            if accept_rollback is None:
                self._check_history()
            else:
                self._accept_history(accept_rollback)
        except BaseException:
            self.database.close()
            raise
        self.packages = PackageKeyRegistry(self.database, self._secrets, self.audit, clock=clock)

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        database_url: str | None = None,
        key_encryption_key: str | None = None,
        witnesses: Sequence[Path] = (),
        clock: Callable[[], float] = time.time,
    ) -> AttestorState:
        """The state in, or described by, `directory`. Raises as `__init__` does."""
        return cls(StateLocation(Path(directory), database_url, key_encryption_key, tuple(witnesses)), clock=clock)

    def key_set(self) -> KeySet:
        """Public halves of all keys that ever signed tokens and audit records here."""
        return self.keys.ever()

    def rotate_signing_key(self, overlap_seconds: int) -> AttestorKey:
        """Announce a new signing key, which signs once the overlap is over; attestors that run take it by themselves.

        Raises ConfigurationError while another one is announced.
        """
        signs_from = int(self._clock()) + overlap_seconds
        fields: dict[str, object] = {"signs_from": signs_from}
        with self.audit.recording("rotate_signing_key", fields) as connection:
            key = self.keys.rotate(connection, signs_from)
            fields["new"] = key.thumbprint
        return key

    @property
    def authority(self) -> Authority:
        """The authority that certifies services now."""
        return self.authorities.current

    def rotate_authority(self, overlap_seconds: int, retire_seconds: int) -> Authority:
        """Announce a new authority, which issues once the overlap is over, and is trusted alone `retire_seconds` after
        that; attestors that run take it by themselves.

        Raises ConfigurationError while another one is announced.
        """
        issues_from = int(self._clock()) + overlap_seconds
        alone_from = issues_from + retire_seconds
        fields: dict[str, object] = {"issues_from": issues_from, "alone_from": alone_from}
        with self.audit.recording("rotate_authority", fields) as connection:
            made = self.authorities.rotate(connection, issues_from, alone_from)
            fields["new"] = made.fingerprint
        return made

    def enrol(self, name: ServiceName, life_seconds: int) -> str:
        """A secret that gets one certificate with this name, once. Raises ConfigurationError for attested roles."""
        expires_at = int(self._clock()) + life_seconds
        fields = {"role": name.role, "tenant": name.tenant, "expires_at": expires_at}
        with self.audit.recording("enrolment", fields) as connection:
            return create_enrolment(connection, name, expires_at=expires_at)

    def rotate_key_encryption_key(self, name: str) -> int:
        """Wrap all secrets under the key that `name` stands for, in one transaction with its audit record; how many.

        Attestors that run must be restarted with the new key: until then they release nothing. Raises
        ConfigurationError, UnavailableError, or PackageKeyError when a row was edited; nothing has changed then.
        """
        new = Secrets(open_key_encryption_key(name, create=True))
        if new.key.id == self._secrets.key.id:
            raise ConfigurationError("this is the present key-encryption key; name another one")
        fields = {"old": self._secrets.key.id, "new": new.key.id, "secrets": 0}
        with self.audit.recording("rotate_key_encryption_key", fields) as connection:
            self._secrets.check(connection)
            count = sum(
                rewrap(connection, self._secrets, new)
                for rewrap in (rewrap_packages, rewrap_signing_keys, rewrap_authorities)
            )
            name_key(connection, new.key)
            fields["secrets"] = count
        self._secrets = new
        self.keys = SigningKeys(self.database, new, clock=self._clock)
        self.authorities = Authorities(self.database, new, clock=self._clock)
        self.packages = PackageKeyRegistry(self.database, new, self.audit, clock=self._clock)
        return count

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def __enter__(self) -> AttestorState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_secrets(self, location: StateLocation) -> Secrets:
        name = location.key_encryption_key or f"file:{self.directory / 'kek'}"
        with self.database.writing() as connection:
            is_new = key_of(connection) is None
            secrets = Secrets(open_key_encryption_key(name, create=is_new))
            if is_new:
                name_key(connection, secrets.key)
            secrets.check(connection)
        return secrets

    def _check_history(self) -> None:
        kept = self._heads.read(self.key_set())
        with self.database.reading() as connection:
            newest = head_of(connection)
            numbers = [item.records for item in kept]
            rows = connection.execute(select(AUDIT.c.record, AUDIT.c.hash).where(AUDIT.c.record.in_(numbers)))
            check_not_set_back(newest, kept, {row.record: row.hash for row in rows})
            verify_newest(connection, self.key_set())
        if newest.records and (missing := self._heads.missing):
            raise RollbackError(
                f"the database has audit records, but the head {missing[0]} is missing, without which nobody knows "
                "whether it was set back: restore it, or, for a new attestor on this database or a new witness, run "
                "`tensafe attestor accept-rollback`"
            )

    def _accept_history(self, why: str) -> None:
        """The database as it is becomes the truth, with a record of what was known before."""
        before = [path.read_text("utf-8", "replace")[:400] for path in self._heads.files if path.exists()]
        with self.database.reading() as connection:
            newest = verify_newest(connection, self.key_set())
        fields = {"why": why[:400], "records": newest.records, "heads_before": before}
        # Not through `self.audit`: it would never lower a head.
        AuditLog(self.database, self.key, HeadKeeper([]), clock=self._clock).append("accept_rollback", fields)
        self._heads.keep(self.audit.head, self.key, int(self._clock()), lower=True)


def _open_directory(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode
    except OSError as error:
        raise ConfigurationError(f"cannot make state directory {directory}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigurationError(f"{directory} can be entered by other users; run: chmod 700 {directory}")
    if earlier := [name for name in _EARLIER_FILES if (directory / name).exists()]:
        raise ConfigurationError(
            f"{directory} has the state of an earlier version ({', '.join(earlier)}), which this one does not read: "
            "name a new directory and pack the adapters again"
        )
    return directory.resolve()
