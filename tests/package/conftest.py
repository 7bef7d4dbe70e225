"""One packed adapter for all tests of packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.writer import pack_adapter
from tensorguard.store.packages import PackageKeyRegistry
from tensorguard.store.state import AttestorState
from tests.support.adapters import write_adapter, write_base_model


@dataclass(frozen=True)
class Packed:
    """A package on disk, and everything secret about it."""

    path: Path
    adapter: Path
    base_model: Path
    keys: SigningKeys
    registry: PackageKeyRegistry
    content_key: bytes
    verified: VerifiedManifest

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Arguments of pack_adapter that would make the next sequence of this package."""
        return {
            "base_model_dir": self.base_model,
            "tenant": "acme",
            "package_id": "law-style",
            "sequence": 2,
            "signing_keys": self.keys,
            "key_registrar": self.registry.register,
        } | changes


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("package")
    adapter, base_model = write_adapter(folder / "adapter"), write_base_model(folder / "model")
    keys, registry = SigningKeys.generate(), AttestorState.open(folder / "attestor").packages
    verified = pack_adapter(
        adapter,
        folder / "adapter.tssp",
        base_model_dir=base_model,
        tenant="acme",
        package_id="law-style",
        sequence=1,
        signing_keys=keys,
        key_registrar=registry.register,
    )
    content_key = registry.lookup("acme", "law-style", 1, verified.digest).content_key
    return Packed(folder / "adapter.tssp", adapter, base_model, keys, registry, content_key, verified)
