"""Reports of the platform's security module through Linux's configfs-tsm, the same for TDX and SEV-SNP.

Linux ABI `configfs-tsm-report` (since 6.7): a directory made below the root is one request. Bytes written to `inblob`
are the report data, `outblob` is the signed report, `auxblob` what the platform adds to it (SEV-SNP: certificates).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensorguard.errors import ConfigurationError, InvalidInputError, UnavailableError

REPORT_ROOT = Path("/sys/kernel/config/tsm/report")
REPORT_DATA_BYTES = 64
MAX_BLOB_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class TsmReport:
    """What the security module answered."""

    outblob: bytes
    auxblob: bytes
    """Empty where the platform adds nothing."""


def read_report(report_data: bytes, *, provider: str, root: Path = REPORT_ROOT) -> TsmReport:
    """A fresh report over 64 bytes of report data.

    `provider`: the driver that must answer, `tdx_guest` or `sev_guest`.
    Raises ConfigurationError where the machine has none or another one, and UnavailableError where it fails.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise InvalidInputError(f"report data have {REPORT_DATA_BYTES} bytes")
    with _entry(root) as entry:
        return _request(entry, report_data, provider)


def find_provider(root: Path = REPORT_ROOT) -> str | None:
    """The driver that answers requests on this machine, None where it offers no reports. Raises as `read_report`."""
    if not root.is_dir():
        return None
    with _entry(root) as entry:
        return _provider(entry)


@contextlib.contextmanager
def _entry(root: Path) -> Iterator[Path]:
    """A request of our own, removed in the end."""
    if not root.is_dir():
        raise ConfigurationError(
            f"this machine offers no attestation reports: there is no {root}. In a confidential virtual machine with "
            "Linux 6.7 or later, load the driver (tdx-guest or sev-guest) and mount configfs"
        )
    entry = root / f"tensafe-{secrets.token_hex(8)}"
    try:
        entry.mkdir()
    except OSError as error:
        raise ConfigurationError(
            f"cannot ask for an attestation report below {root}: {error.strerror}; this takes the right to write there"
        ) from None
    try:
        yield entry
    except OSError as error:
        raise UnavailableError(
            f"the platform's security module did not answer: {error.strerror}; see the machine's kernel log "
            "(TDX: is the quote generation service running on the host?)"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            entry.rmdir()


def _provider(entry: Path) -> str:
    return _read(entry / "provider").decode("ascii", "replace").strip()


def _request(entry: Path, report_data: bytes, provider: str) -> TsmReport:
    found = _provider(entry)
    if found != provider:
        raise ConfigurationError(f"this machine's attestation reports come from {found!r}, not from {provider!r}")
    before = _generation(entry)
    _write(entry / "inblob", report_data)
    auxblob = entry / "auxblob"
    report = TsmReport(_read(entry / "outblob"), _read(auxblob) if auxblob.exists() else b"")
    # The kernel counts writes: another one in between means that the report is over somebody else's data.
    if _generation(entry) != before + 1:
        raise UnavailableError("somebody else wrote to this request for an attestation report; try again")
    if not report.outblob:
        raise UnavailableError("the platform's security module answered with nothing")
    return report


def _generation(entry: Path) -> int:
    text = _read(entry / "generation").decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise UnavailableError("the kernel's count of requests is not a number")
    return int(text)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_BLOB_BYTES + 1)
    if len(data) > MAX_BLOB_BYTES:
        raise UnavailableError(f"{path.name} of the attestation report is larger than {MAX_BLOB_BYTES} bytes")
    return data


def _write(path: Path, data: bytes) -> None:
    """In one write: configfs takes what is written until the file is closed."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(0, "the report data were cut off")
    finally:
        os.close(descriptor)
