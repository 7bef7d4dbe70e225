"""Heads of the audit log outside of the database, by which a database that was set back is noticed.

After each commit, and before anybody is answered, the number and hash of the newest record go, signed, into a head file
in the state directory and into any further ones ("witnesses": files on another disk or machine). A database restored
from an old backup has fewer records than its head, or others: the attestor then refuses to start until an operator
accepts the state, which is a record itself. Numbers in a head file only go up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.crypto import canonical
from tensorguard.crypto.files import replace_file
from tensorguard.errors import InternalError, InvalidInputError, TenSafeError
from tensorguard.evidence.keys import AttestorKey, KeySet

FILE_NAME = "audit.head"
GENESIS = "0" * 64
_DOMAIN = b"tssp-audit-head/v1\x00"
_MAX_BYTES = 4096


class AuditError(TenSafeError):
    """The audit log has been changed or cannot be read; the message says at which record."""

    reason = "audit"


class RollbackError(AuditError):
    """The database is older than a head of its audit log, or has another history."""

    reason = "rollback"


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of an audit log."""

    records: int
    hash: str
    """Of the newest record, hex; zeros for an empty log."""


class HeadKeeper:
    """Keeps heads in files. Safe for threads and processes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def keep(self, head: AuditHead, key: AttestorKey, now: int, *, lower: bool = False) -> None:
        """Write `head` into every file whose number is lower (with `lower`: into every file), and wait for the disk.

        Raises InternalError when one cannot be written: then nothing may be answered.
        """
        content = {"records": head.records, "hash": head.hash, "time": now, "key": key.thumbprint}
        signed = content | {"signature": key.sign(_DOMAIN + canonical.dumps(content)).hex()}
        for path in self.files:
            try:
                with _locked(path):
                    present = None if lower else _read(path)
                    if present is None or present[0].records < head.records:
                        replace_file(path, canonical.dumps(signed))
            except OSError as error:
                raise InternalError(f"the audit head {path} cannot be written ({error.strerror})") from None

    def read(self, keys: KeySet) -> list[AuditHead]:
        """The heads that are there, their signatures verified with `keys`.

        Raises RollbackError for one that another attestor's key, or one lost with the database, signed.
        """
        return [_verified(path, found, keys) for path in self.files if (found := _read(path)) is not None]

    @property
    def missing(self) -> list[Path]:
        """Files that do not exist yet."""
        return [path for path in self.files if not path.exists()]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[AuditHead, dict[str, object]] | None:
    try:
        with path.open("rb") as stream:
            value = canonical.loads(stream.read(_MAX_BYTES + 1), _MAX_BYTES)
        if set(value) != {"records", "hash", "time", "key", "signature"}:
            raise ValueError
        return AuditHead(int(value["records"]), str(value["hash"])), value
    except FileNotFoundError:
        return None
    except (OSError, InvalidInputError, TypeError, ValueError):
        raise AuditError(f"{path} is not the head of an audit log; restore it") from None


def _verified(path: Path, found: tuple[AuditHead, dict[str, object]], keys: KeySet) -> AuditHead:
    head, value = found
    key = keys.get(str(value["key"]))
    if key is None:
        raise RollbackError(f"{path} was signed with a key that the database does not have: {_WHAT_TO_DO}")
    content = {name: item for name, item in value.items() if name != "signature"}
    try:
        key.verify(
            bytes.fromhex(str(value["signature"])), _DOMAIN + canonical.dumps(content), ec.ECDSA(hashes.SHA256())
        )
    except (InvalidSignature, ValueError):
        raise AuditError(f"the signature of the audit head {path} does not verify: the file was edited") from None
    return head


def check_not_set_back(head: AuditHead, kept: Sequence[AuditHead], hash_at: dict[int, str]) -> None:
    """Raise RollbackError unless every kept head is a record of the log that ends with `head`.

    `hash_at`: hashes in the database by record number, at least for the kept heads that it has.
    """
    for item in kept:
        if item.records > head.records:
            raise RollbackError(
                f"the database ends with audit record {head.records}, but record {item.records} was written before: it "
                f"was set back. {_WHAT_TO_DO}"
            )
        if hash_at.get(item.records, GENESIS) != item.hash:
            raise RollbackError(
                f"the database has another audit record {item.records} than was written before: it has another "
                f"history. {_WHAT_TO_DO}"
            )


_WHAT_TO_DO = (
    "Stop its attestors and restore the newest database. If that is lost, budgets and revocations since then are too: "
    "run `tensafe attestor accept-rollback`, revoke again what was revoked, and only then start an attestor"
)
