"""Makers' certificates and collateral, kept in a directory by whoever runs the verifier.

Nothing is fetched: somebody gets new collateral (Intel's is good for 30 days) and puts it there, and the next
evidence is verified with it. One folder a kind, `tdx/`, `snp/`, `nitro/`; every file in it is one endorsement.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

import structlog

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.platform import EvidenceVerifier

log = structlog.get_logger(__name__)

MAX_FILES = 240
MAX_FILE_BYTES = 256 * 1024
_Version = tuple[tuple[str, int, int], ...]


class EndorsementDirectory:
    """Reads endorsements, again whenever a file has changed. Safe for several threads.

    A file that is no endorsement is never left aside: it may have been meant as a revocation list.
    """

    def __init__(self, directory: Path | None, verifiers: Mapping[EvidenceKind, EvidenceVerifier]) -> None:
        """`directory` None: there are none. `verifiers`: of the kinds that are asked for; they say what a file is.

        Raises ConfigurationError when it is not a directory.
        """
        if directory is not None and not directory.is_dir():
            raise ConfigurationError(f"the endorsements directory {directory} is not there; make it, or name another")
        self._directory = directory
        self._verifiers = verifiers
        self._lock = threading.Lock()
        self._read: dict[EvidenceKind, tuple[_Version, tuple[bytes, ...]]] = {}

    def of(self, kind: EvidenceKind) -> tuple[bytes, ...]:
        """The files of a kind by name, one element each. Files whose name begins with a dot are left aside.

        Raises ConfigurationError when there are more than 240, and naming the file when one is larger than 256 KiB,
        cannot be read or is no endorsement of this kind.
        """
        if self._directory is None:
            return ()
        folder = self._directory / kind.value
        with self._lock:
            try:
                version = _version(folder)
                known = self._read.get(kind)
                if known is None or known[0] != version:
                    known = version, tuple(self._checked(kind, folder / name) for name, _, _ in version)
                    self._read[kind] = known
            except OSError as error:
                raise ConfigurationError(f"cannot read endorsements in {folder}: {error.strerror}") from None
            return known[1]

    def check(self, kinds: Collection[EvidenceKind]) -> None:
        """Raises what `of` does for one of the kinds: called before anybody waits for an answer."""
        for kind in sorted(kinds):
            self.of(kind)

    def _checked(self, kind: EvidenceKind, path: Path) -> bytes:
        data = _read(path)
        try:
            self._verifiers[kind].check_endorsement(data)
        except EvidenceRefusedError as refused:
            log.error("endorsement of no use", path=str(path), reason=refused.detail)
            raise ConfigurationError(
                f"the endorsement {path} cannot be used: {refused.message} [{refused.detail}]; replace the file, or "
                "take it out of the directory"
            ) from None
        return data


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
