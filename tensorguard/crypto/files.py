"""Files of which nobody must see a part: secrets, and state that is replaced as a whole. Mode 0600."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from tensorguard.errors import ConfigurationError

MAX_KEY_FILE_BYTES = 64 * 1024


def write_secret_file(path: Path, data: bytes) -> None:
    """Create `path` (mode 0600) with `data`, completely or not at all.

    Raises ConfigurationError when the file exists: a key that is overwritten cannot be had back.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)  # unlike a rename, this fails when the name is taken
    except FileExistsError:
        raise ConfigurationError(f"{path} exists already; it is not overwritten") from None
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` (mode 0600) in the place of what `path` has, completely or not at all, and on the disk.

    Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_secret_file(path: Path) -> bytes:
    """Return the content of a key file of at most 64 KiB.

    Raises ConfigurationError when it is missing, too large, or readable by group or others.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(f"{path} is not a regular file")
            if status.st_mode & 0o077:
                raise ConfigurationError(f"{path} can be read by other users; run: chmod 600 {path}")
            data = stream.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read key file {path}: {error.strerror or error}") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigurationError(f"{path} is larger than any key file")
    return data
