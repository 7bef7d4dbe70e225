"""Options that every command on an attestor's state has: where it is and what its secrets are wrapped under."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tensorguard.package.publishers import DEFAULT_ATTESTOR_STATE
from tensorguard.store.state import StateLocation

StateDirectory = Annotated[
    Path, typer.Option("--attestor-state", help="State directory of the attestor.", envvar="TENSAFE_ATTESTOR_STATE_DIR")
]
DatabaseUrl = Annotated[
    Optional[str],  # noqa: UP045 - typer evaluates this on Python 3.10
    typer.Option(
        help="PostgreSQL or SQLite URL; default: in the state directory.",
        envvar="TENSAFE_ATTESTOR_DATABASE_URL",
        show_envvar=True,
    ),
]
KeyName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--key-encryption-key",
        help="file:PATH, env:NAME or vault:https://HOST/MOUNT/KEY; default: the file kek in the state directory.",
        envvar="TENSAFE_ATTESTOR_KEY_ENCRYPTION_KEY",
        show_envvar=True,
    ),
]
Witnesses = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--witness", help="Further file that keeps the audit head; give what the attestor is given."),
]
DEFAULT_STATE = DEFAULT_ATTESTOR_STATE


def location(
    directory: Path, database_url: str | None = None, key: str | None = None, witnesses: list[Path] | None = None
) -> StateLocation:
    """What the options say."""
    return StateLocation(directory.expanduser(), database_url, key, tuple(witnesses or ()))
