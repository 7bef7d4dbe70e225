"""Rollback of packages, as who opens them notices it: nothing older than what was opened before.

The attestor refuses old sequences first. This is for the day when the attestor itself was set back, and for a file that
is exchanged under a running coprocessor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tensorguard.crypto import canonical
from tensorguard.crypto.files import replace_file
from tensorguard.errors import ConfigurationError, InvalidInputError, PackageRollbackError
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.manifest import Name, Sha256
from tensorguard.package.names import MAX_SEQUENCE

MAX_PACKAGES = 4096
MAX_FILE_BYTES = 2 * 1024 * 1024
"""Of as many packages, with the longest names."""


class OpenedRelease(BaseModel):
    """The newest release of a package that was opened."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tenant: Name
    package_id: Name
    sequence: Annotated[int, Field(ge=1, le=MAX_SEQUENCE)]
    digest: Sha256


class OpenedReleases(BaseModel):
    """The file: canonical JSON of this."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["tssp-opened/v1"]
    releases: Annotated[tuple[OpenedRelease, ...], Field(max_length=MAX_PACKAGES)]


class RollbackGuard:
    """Remembers releases that were opened, in a file if there is one. Safe for threads; a file is for one process."""

    def __init__(self, file: Path | None = None) -> None:
        """A file that is not there yet is made at the first package. Raises ConfigurationError when it is unreadable:
        what it knew would be lost.
        """
        self._file = file
        self._lock = threading.Lock()
        releases = _read(file).releases if file is not None and file.exists() else ()
        self._newest = {(item.tenant, item.package_id): item for item in releases}

    def check(self, verified: VerifiedManifest) -> None:
        """Raise PackageRollbackError for an older sequence than was opened, or the same one with another manifest."""
        manifest = verified.manifest
        with self._lock:
            newest = self._newest.get((manifest.tenant, manifest.package_id))
        if newest is None or manifest.sequence > newest.sequence:
            return
        name = f"{manifest.tenant}/{manifest.package_id}"
        if manifest.sequence < newest.sequence:
            raise PackageRollbackError(
                f"sequence {manifest.sequence} of {name} is older than {newest.sequence}, which was opened before: "
                "serve the newest package, or have its owner `tensafe rekey` this one to a new sequence"
            )
        if verified.digest != newest.digest:
            raise PackageRollbackError(
                f"sequence {manifest.sequence} of {name} was opened before with another manifest: its owner has to "
                "pack it under a new sequence"
            )

    def remember(self, verified: VerifiedManifest) -> None:
        """A release was opened. Raises as `check` does, and ConfigurationError when the file cannot be written."""
        self.check(verified)
        manifest = verified.manifest
        key = (manifest.tenant, manifest.package_id)
        item = OpenedRelease(tenant=key[0], package_id=key[1], sequence=manifest.sequence, digest=verified.digest)
        with self._lock:
            if self._newest.get(key) == item:
                return
            newest = {**self._newest, key: item}
            if self._file is not None:
                if len(newest) > MAX_PACKAGES:
                    raise ConfigurationError(f"{self._file} is full with {MAX_PACKAGES} packages: begin another file")
                _write(self._file, [newest[name] for name in sorted(newest)])
            self._newest = newest


def _read(path: Path) -> OpenedReleases:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        canonical.loads(data, MAX_FILE_BYTES)
        return OpenedReleases.model_validate_json(data)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from None
    except (InvalidInputError, ValidationError):
        raise ConfigurationError(
            f"{path} is not a record of opened releases: restore it, or remove it to trust the attestor alone"
        ) from None


def _write(path: Path, releases: Sequence[OpenedRelease]) -> None:
    """Whole or not at all, and on the disk before anything is served."""
    opened = OpenedReleases(format="tssp-opened/v1", releases=tuple(releases))
    try:
        replace_file(path, canonical.dumps(opened.model_dump(mode="json")))
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
