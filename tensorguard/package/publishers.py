"""Public keys of those who published the packages whose content keys an attestor holds."""

from __future__ import annotations

from pathlib import Path

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import ConfigurationError

DEFAULT_ATTESTOR_STATE = Path("~/.tensafe/attestor")
"""State directory that `tensafe pack` and the single-machine commands use by default."""

_FOLDER = "publishers"
_SUFFIX = ".pub.pem"


def remember_publisher(state_dir: Path, keys: VerifyingKeys) -> Path:
    """Keep a publisher's public keys in `state_dir`; returns the file. Doing it again changes nothing."""
    folder = state_dir / _FOLDER
    path = folder / f"{keys.key_id}{_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(keys.to_pem())
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    return path


def known_publishers(state_dir: Path) -> tuple[Path, ...]:
    """Files of all publishers that are remembered in `state_dir`."""
    return tuple(sorted((state_dir / _FOLDER).glob(f"*{_SUFFIX}")))


def forget_publisher(state_dir: Path, keys: VerifyingKeys) -> None:
    """Trust a publisher no longer in `state_dir`. Doing it again changes nothing."""
    path = state_dir / _FOLDER / f"{keys.key_id}{_SUFFIX}"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot remove {path}: {error.strerror}") from None
