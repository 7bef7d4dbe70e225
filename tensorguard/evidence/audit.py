"""The attestor's audit log: append-only JSON lines, each chained to the one before and signed.

A record is on disk before the decision it describes is answered. A record's hash covers its content and the
hash of the one before, so editing, deleting or moving a record breaks the chain; the signature stops whoever
can write the file, but does not have the attestor's key, from making a new chain. The newest hash is kept
beside the log, so that a log cut short at the end is noticed as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.crypto import canonical
from tensorguard.errors import ConfigurationError, InternalError, InvalidInputError, TenSafeError
from tensorguard.evidence.keys import AttestorKey, KeySet

GENESIS = "0" * 64
MAX_RECORD_BYTES = 8192
_DOMAIN = b"tssp-audit/v1\x00"
_OWN_FIELDS = frozenset({"record", "time", "event", "previous", "key", "hash", "signature"})


class AuditError(TenSafeError):
    """The audit log has been changed or cannot be read; the message says at which record."""

    reason = "audit"


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of a verified log."""

    records: int
    hash: str
    """Of the newest record, hex; zeros for an empty log."""


class AuditLog:
    """Appends to a log. One process at a time holds it (a file lock); threads may share it."""

    def __init__(self, path: Path, key: AttestorKey, *, clock: Callable[[], float] = time.time) -> None:
        """Open or make the log and verify all of it.

        Raises AuditError when it was changed and ConfigurationError when another process has it open.
        """
        self._key = key
        self._clock = clock
        self._lock = threading.Lock()
        self._head_file = path.with_suffix(".head")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"cannot open audit log {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigurationError(
                f"{path} is in use by another attestor; stop that one, or choose another state directory"
            ) from None
        try:
            self._drop_torn_write(path)
            self._head = verify_audit_log(path, key.key_set())
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> AuditHead:
        """The newest record."""
        return self._head

    def append(self, event: str, fields: Mapping[str, Any]) -> AuditHead:
        """Write a record and wait until it is on disk. `fields` holds JSON values, and never secrets.

        Raises InternalError when it cannot be written: then nothing may be answered.
        """
        if clash := _OWN_FIELDS & fields.keys():
            raise InternalError(f"audit fields {sorted(clash)} are reserved")
        with self._lock:
            if self._file < 0:
                raise InternalError("the audit log is closed")
            record: dict[str, Any] = {
                **fields,
                "record": self._head.records + 1,
                "time": int(self._clock()),
                "event": event,
                "previous": self._head.hash,
                "key": self._key.thumbprint,
            }
            digest = _digest(record)
            record["hash"] = digest.hex()
            record["signature"] = self._key.sign(_DOMAIN + digest).hex()
            line = canonical.dumps(record) + b"\n"
            if len(line) > MAX_RECORD_BYTES:
                raise InternalError("the audit record is too large")
            head = AuditHead(self._head.records + 1, digest.hex())
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError("short write")
                os.fsync(self._file)
                _write_head(self._head_file, head)
            except OSError as error:
                # What reached the disk is unknown: nothing follows it until a restart has verified it.
                self._close_file()
                raise InternalError(f"the audit log cannot be written ({error})") from None
            self._head = head
            return head

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _drop_torn_write(self, path: Path) -> None:
        """A last line without its newline was cut off by a crash and never answered for: remove it."""
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.ftruncate(self._file, data.rfind(b"\n") + 1)
            os.fsync(self._file)


def verify_audit_log(path: Path, keys: KeySet | None = None, *, expected: AuditHead | None = None) -> AuditHead:
    """Check every record of a log and return its head.

    keys: also check every signature. expected: a head seen earlier (from GetStatus), which must be in the
    log; the head file beside the log, where there is one, is checked likewise.

    Raises AuditError naming the record.
    """
    wanted = [head for head in (expected, _read_head(path.with_suffix(".head"))) if head is not None]
    head = AuditHead(0, GENESIS)
    seen = {0: GENESIS}
    positions = {item.records for item in wanted}
    for record in read_audit_log(path):
        number = head.records + 1
        digest = _digest(record)
        if record.get("record") != number or record.get("previous") != head.hash:
            raise AuditError(f"audit record {number}: a record was removed, inserted or moved here")
        if record.get("hash") != digest.hex():
            raise AuditError(f"audit record {number}: its content was changed")
        if keys is not None:
            _verify_signature(record, digest, keys, number)
        head = AuditHead(number, digest.hex())
        if number in positions:
            seen[number] = head.hash
    for item in wanted:
        if seen.get(item.records) != item.hash:
            raise AuditError(
                f"the audit log has {head.records} records and lacks record {item.records} as seen before: "
                "it was cut short or replaced"
            )
    return head


def read_audit_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records as they stand in the file, unverified. Raises AuditError for lines that are no records."""
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if not line.endswith(b"\n"):
                    raise AuditError(f"audit record {number} is cut off or too long")
                try:
                    record = canonical.loads(line[:-1])
                except InvalidInputError:
                    raise AuditError(f"audit record {number} is not canonical JSON") from None
                if not isinstance(record, dict):
                    raise AuditError(f"audit record {number} is not an object")
                yield record
    except OSError as error:
        raise AuditError(f"cannot read audit log {path}: {error.strerror}") from None


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


def _write_head(path: Path, head: AuditHead) -> None:
    temporary = path.with_name(f".{path.name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(canonical.dumps({"records": head.records, "hash": head.hash}))
    temporary.replace(path)


def _read_head(path: Path) -> AuditHead | None:
    if not path.exists():
        return None
    try:
        value = canonical.loads(path.read_bytes())
        return AuditHead(int(value["records"]), str(value["hash"]))
    except (OSError, InvalidInputError, KeyError, TypeError, ValueError):
        raise AuditError(f"{path} is not the head of an audit log") from None
