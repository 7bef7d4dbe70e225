"""The audit log: records in the database, each chained to the one before and signed.

A decision changes the database and is recorded in one transaction, which is committed before anybody is answered. A
record's hash covers its content and the hash of the one before, so editing, deleting or moving a record breaks the
chain; the signature stops whoever can write the database, but does not have the attestor's key, from making a new
chain. Heads kept outside of the database (`tensorguard.store.audit_head`) show that it was set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, select

from tensorguard.crypto import canonical
from tensorguard.errors import InternalError, InvalidInputError
from tensorguard.evidence.keys import AttestorKey, KeySet
from tensorguard.store.audit_head import GENESIS, AuditError, AuditHead, HeadKeeper, check_not_set_back
from tensorguard.store.database import Database
from tensorguard.store.schema import AUDIT

MAX_RECORD_BYTES = 8192
VERIFIED_AT_START = 10_000
_DOMAIN = b"tssp-audit/v1\x00"
_OWN_FIELDS = frozenset({"record", "time", "event", "previous", "key", "hash", "signature"})
_PAGE = 1000


class AuditLog:
    """Appends to the log. Safe for threads, and for several processes on one database."""

    def __init__(
        self, database: Database, key: AttestorKey, heads: HeadKeeper, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._key = key
        self._heads = heads
        self._clock = clock
        self._newest = AuditHead(0, GENESIS)
        """That this process knows of."""

    @property
    def head(self) -> AuditHead:
        """The newest record."""
        with self._database.reading() as connection:
            return head_of(connection)

    @contextlib.contextmanager
    def recording(self, event: str, fields: Mapping[str, Any]) -> Iterator[Connection]:
        """A writing transaction that ends with a record: what the block changes is committed with it, or not at all.

        `fields` is read when the block ends; it holds JSON values, and never secrets. Nothing may be answered before
        this context is left, and nothing when leaving raises: InternalError, UnavailableError, ConfigurationError, or
        RollbackError when the database was set back since the last record.
        """
        with self._database.writing() as connection:
            yield connection
            head = self._append(connection, event, fields)
        self._newest = head
        self._heads.keep(head, self._key, int(self._clock()))

    def append(self, event: str, fields: Mapping[str, Any]) -> None:
        """A record of something that changes nothing else. Raises as `recording` does."""
        with self.recording(event, fields):
            pass

    def _append(self, connection: Connection, event: str, fields: Mapping[str, Any]) -> AuditHead:
        if clash := _OWN_FIELDS & fields.keys():
            raise InternalError(f"audit fields {sorted(clash)} are reserved")
        last = head_of(connection)
        self._check_goes_on(connection, last)
        record: dict[str, Any] = {
            **fields,
            "record": last.records + 1,
            "time": int(self._clock()),
            "event": event,
            "previous": last.hash,
            "key": self._key.thumbprint,
        }
        digest = _digest(record)
        record["hash"] = digest.hex()
        record["signature"] = self._key.sign(_DOMAIN + digest).hex()
        line = canonical.dumps(record)
        if len(line) > MAX_RECORD_BYTES:
            raise InternalError("the audit record is too large")
        connection.execute(AUDIT.insert().values(record=record["record"], hash=record["hash"], line=line.decode()))
        return AuditHead(last.records + 1, digest.hex())

    def _check_goes_on(self, connection: Connection, last: AuditHead) -> None:
        """Raises RollbackError. Without this, new records would grow past the heads kept outside, and hide it."""
        newest = self._newest
        if last != newest:
            rows = connection.execute(select(AUDIT.c.record, AUDIT.c.hash).where(AUDIT.c.record == newest.records))
            check_not_set_back(last, [newest], {row.record: row.hash for row in rows})


def head_of(connection: Connection) -> AuditHead:
    """The newest record, unverified."""
    row = connection.execute(select(AUDIT.c.record, AUDIT.c.hash).order_by(AUDIT.c.record.desc()).limit(1)).first()
    return AuditHead(0, GENESIS) if row is None else AuditHead(row.record, row.hash)


def records_of(connection: Connection, *, after: int = 0) -> Iterator[bytes]:
    """The records behind number `after`, one canonical JSON object each, in order."""
    while True:
        page = connection.execute(
            select(AUDIT.c.record, AUDIT.c.hash, AUDIT.c.line)
            .where(AUDIT.c.record > after)
            .order_by(AUDIT.c.record)
            .limit(_PAGE)
        ).all()
        for row in page:
            yield row.line.encode()
        if len(page) < _PAGE:
            return
        after = page[-1].record


def records_in_file(path: Path) -> Iterator[bytes]:
    """The records of an export: the same, as lines. Raises AuditError."""
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_RECORD_BYTES + 2):
                number += 1
                if not line.endswith(b"\n"):
                    raise AuditError(f"audit record {number} is cut off or too long")
                yield line[:-1]
    except OSError as error:
        raise AuditError(f"cannot read audit log {path}: {error.strerror}") from None


def verify_records(
    records: Iterable[bytes],
    keys: KeySet | None = None,
    *,
    seen: Iterable[AuditHead] = (),
    start: AuditHead = AuditHead(0, GENESIS),  # noqa: B008 - immutable
) -> AuditHead:
    """Check the chain that `records` make behind `start`, and return its head.

    keys: also check every signature. seen: heads that were seen earlier, which must be in the chain.
    Raises AuditError naming the record.
    """
    wanted = list(seen)
    hashes_seen = {start.records: start.hash}
    numbers = {item.records for item in wanted}
    head = start
    for line in records:
        number = head.records + 1
        record = _parse(line, number)
        digest = _digest(record)
        if record.get("record") != number or record.get("previous") != head.hash:
            raise AuditError(f"audit record {number}: a record was removed, inserted or moved here")
        if record.get("hash") != digest.hex():
            raise AuditError(f"audit record {number}: its content was changed")
        if keys is not None:
            _verify_signature(record, digest, keys, number)
        head = AuditHead(number, digest.hex())
        if number in numbers:
            hashes_seen[number] = head.hash
    for item in wanted:
        if hashes_seen.get(item.records) != item.hash:
            raise AuditError(
                f"the audit log has {head.records} records and lacks record {item.records} as seen before: "
                "it was cut short or replaced"
            )
    return head


def verify_newest(connection: Connection, keys: KeySet, count: int = VERIFIED_AT_START) -> AuditHead:
    """Check the newest `count` records in the database, with their signatures. Raises AuditError."""
    after = max(0, head_of(connection).records - count)
    start = AuditHead(0, GENESIS)
    if after:
        before = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.record == after)).scalar()
        start = AuditHead(after, before or "")
    return verify_records(records_of(connection, after=after), keys, start=start)


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        record = canonical.loads(line, MAX_RECORD_BYTES)
    except InvalidInputError:
        raise AuditError(f"audit record {number} is not canonical JSON of at most {MAX_RECORD_BYTES} bytes") from None
    if not isinstance(record, dict):
        raise AuditError(f"audit record {number} is not an object")
    return record


def _digest(record: Mapping[str, Any]) -> bytes:
    content = {name: value for name, value in record.items() if name not in ("hash", "signature")}
    return hashlib.sha256(_DOMAIN + canonical.dumps(content)).digest()


def _verify_signature(record: Mapping[str, Any], digest: bytes, keys: KeySet, number: int) -> None:
    key = keys.get(str(record.get("key")))
    if key is None:
        raise AuditError(f"audit record {number}: signed with a key that is not this attestor's")
    try:
        key.verify(bytes.fromhex(str(record.get("signature"))), _DOMAIN + digest, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise AuditError(f"audit record {number}: its signature does not verify") from None
