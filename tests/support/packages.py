"""Packages whose registered content key is not the one they were sealed with."""

from __future__ import annotations

import os
from typing import Any

from tensorguard.package.registry import PackageKeyRegistry


def register_another_key(registry: PackageKeyRegistry) -> Any:
    """A registrar for `pack_adapter` that gives the attestor a key of the package's name and other bytes."""

    def register(**release: Any) -> None:
        registry.register(**{**release, "content_key": os.urandom(32)})

    return register
