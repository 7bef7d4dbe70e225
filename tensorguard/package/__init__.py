"""Sealed adapter packages (`.tssp` v1, docs/tssp.md).

Names are imported when they are first used: the attestor needs names of packages only, without any ring
arithmetic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorguard.package.base_model import check_base_model
    from tensorguard.package.envelope import VerifiedManifest
    from tensorguard.package.inspection import read_unverified
    from tensorguard.package.manifest import Manifest
    from tensorguard.package.reader import AdapterContents, GroupContents, open_manifest, read_adapter
    from tensorguard.package.renewal import rekey_package, sign_again
    from tensorguard.package.writer import pack_adapter

__all__ = [
    "AdapterContents",
    "GroupContents",
    "Manifest",
    "VerifiedManifest",
    "check_base_model",
    "open_manifest",
    "pack_adapter",
    "read_adapter",
    "read_unverified",
    "rekey_package",
    "sign_again",
]

_MODULES = {
    "AdapterContents": "reader",
    "GroupContents": "reader",
    "Manifest": "manifest",
    "VerifiedManifest": "envelope",
    "check_base_model": "base_model",
    "open_manifest": "reader",
    "pack_adapter": "writer",
    "read_adapter": "reader",
    "read_unverified": "inspection",
    "rekey_package": "renewal",
    "sign_again": "renewal",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
