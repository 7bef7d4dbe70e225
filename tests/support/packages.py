"""Small packages, and ones whose registered content key is not the one they were sealed with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.package.publishers import remember_publisher
from tensorguard.package.writer import pack_adapter
from tensorguard.store.packages import PackageKeyRegistry
from tensorguard.store.state import AttestorState
from tests.support.adapters import write_adapter, write_base_model


def pack_small_adapter(folder: Path, state: Path) -> None:
    """Make `folder`/model and `folder`/law.tssp for it (acme/law-style), with its key and publisher in `state`."""
    keys = SigningKeys.generate()
    pack_adapter(
        write_adapter(folder / "adapter"),
        folder / "law.tssp",
        base_model_dir=write_base_model(folder / "model"),
        tenant="acme",
        package_id="law-style",
        sequence=1,
        signing_keys=keys,
        key_registrar=AttestorState.open(state).packages.register,
    )
    remember_publisher(state, keys.public)


def register_another_key(registry: PackageKeyRegistry) -> Any:
    """A registrar for `pack_adapter` that gives the attestor a key of the package's name and other bytes."""

    def register(**release: Any) -> None:
        registry.register(**{**release, "content_key": os.urandom(32)})

    return register
