"""The compiler of the kernels: numba with an on-disk cache that is valid for exactly this source of the
engine.

numba notices a change of the file a kernel is in, not of the modules whose code it compiled into it. The
cache goes next to the source, or to NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCE = _source_digest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call for the types it sees, without the interpreter lock; cached on disk."""
    dispatcher = numba.njit(cache=True, nogil=True)(function)
    dispatcher._cache._cache_file._source_stamp = _SOURCE
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """Compile into every kernel that calls it."""
    return numba.njit(nogil=True, forceinline=True)(function)
