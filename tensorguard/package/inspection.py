"""Looking into a package without any key. Light to import: no ring arithmetic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from tensorguard.errors import PackageError, PackageTamperedError
from tensorguard.package.envelope import UnverifiedManifest, parse_envelope, read_envelope
from tensorguard.package.manifest import Manifest


def read_unverified(path: Path | str) -> UnverifiedManifest:
    """The manifest without a check of who signed it, for display. Raises PackageError when malformed."""
    with open_package(path) as stream:
        unverified = parse_envelope(read_envelope(stream))
        check_size(stream, unverified.envelope, unverified.manifest)
    return unverified


def open_package(path: Path | str) -> BinaryIO:
    """Open a package file. Raises PackageError."""
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise PackageError(f"cannot read package {path}: {error.strerror or error}") from None


def check_size(stream: BinaryIO, envelope: bytes, manifest: Manifest) -> None:
    """Raise PackageTamperedError unless the file ends where the manifest says."""
    expected = len(envelope) + sum(part.size for part in manifest.parts)
    size = os.fstat(stream.fileno()).st_size
    if size != expected:
        raise PackageTamperedError(f"the package has {size} bytes, but its manifest describes {expected}")
