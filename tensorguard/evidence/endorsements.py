"""Makers' certificates and collateral, kept in a directory by whoever runs the verifier.

Nothing is fetched: somebody gets new collateral (Intel's is good for 30 days) and puts it there, and the next
evidence is verified with it. One folder a kind, `tdx/`, `snp/`, `nitro/`; every file in it is one endorsement.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind

MAX_FILES = 240
MAX_FILE_BYTES = 256 * 1024
_Version = tuple[tuple[str, int, int], ...]


class EndorsementDirectory:
    """Reads endorsements, again whenever a file has changed. Safe for several threads."""

    def __init__(self, directory: Path | None) -> None:
        """`directory` None: there are none. Raises ConfigurationError when it is not a directory."""
        if directory is not None and not directory.is_dir():
            raise ConfigurationError(f"the endorsements directory {directory} is not there; make it, or name another")
        self._directory = directory
        self._lock = threading.Lock()
        self._read: dict[EvidenceKind, tuple[_Version, tuple[bytes, ...]]] = {}

    def of(self, kind: EvidenceKind) -> tuple[bytes, ...]:
        """The files of a kind by name, one element each. Files whose name begins with a dot are left aside.

        Raises ConfigurationError when there are more than 240, one is larger than 256 KiB, or cannot be read.
        """
        if self._directory is None:
            return ()
        folder = self._directory / kind.value
        with self._lock:
            try:
                version = _version(folder)
                known = self._read.get(kind)
                if known is None or known[0] != version:
                    known = version, tuple(_read(folder / name) for name, _, _ in version)
                    self._read[kind] = known
            except OSError as error:
                raise ConfigurationError(f"cannot read endorsements in {folder}: {error.strerror}") from None
            return known[1]


def read_endorsement(path: Path) -> bytes:
    """One endorsement. Raises ConfigurationError when it cannot be read or is larger than 256 KiB."""
    try:
        return _read(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read endorsement {path}: {error.strerror}") from None


def _version(folder: Path) -> _Version:
    """Of each file: name, time of the last change in nanoseconds, size."""
    if not folder.exists():
        return ()
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
        if len(files) > MAX_FILES:
            raise ConfigurationError(f"there are more than {MAX_FILES} endorsements in {folder}")
        return tuple(sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in files))


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigurationError(f"endorsement {path} is larger than {MAX_FILE_BYTES} bytes")
    return data
