"""The state directory of an attestor: what is where, and that only its owner can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorguard.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class AttestorState:
    """Paths in a state directory. `kek` and `packages.sqlite3` in it belong to the package registry."""

    directory: Path

    @classmethod
    def open(cls, directory: Path | str) -> AttestorState:
        """The directory, made with mode 0700 on first use.

        Raises ConfigurationError when it cannot be made or other users can enter it.
        """
        path = Path(directory)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = path.stat().st_mode
        except OSError as error:
            raise ConfigurationError(f"cannot make state directory {path}: {error.strerror}") from None
        if mode & 0o077:
            raise ConfigurationError(f"{path} can be entered by other users; run: chmod 700 {path}")
        return cls(path.resolve())

    @property
    def signing_key(self) -> Path:
        """ES256 key of tokens and audit records, PEM."""
        return self.directory / "signing-key.pem"

    @property
    def audit_log(self) -> Path:
        """The audit log, JSON lines."""
        return self.directory / "audit.jsonl"

    @property
    def leases(self) -> Path:
        """Leases and token budgets, SQLite."""
        return self.directory / "leases.sqlite3"
