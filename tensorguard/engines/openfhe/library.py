"""OpenFHE's Python module, where it can be imported.

Its wheels are tagged for any Python, and hold one extension for one of them: installing always works, importing does
not. So only the import tells.
"""

from __future__ import annotations

import importlib
import platform
from typing import Any

from tensorguard.errors import ConfigurationError

Library = Any
"""The module; it has no type stubs."""


def load_library() -> Library:
    """The module `openfhe`. Raises ConfigurationError that says why it cannot run here and what it needs."""
    try:
        return importlib.import_module("openfhe")
    except ImportError as error:
        libc = " ".join(platform.libc_ver()) or "an unknown C library"
        raise ConfigurationError(
            f"backend openfhe cannot run here, on Python {platform.python_version()} with {libc}: {error}. "
            "OpenFHE's wheels serve Python 3.10 with glibc 2.35 or newer (openfhe==1.6.1.0.22.4) and Python 3.12 with "
            "glibc 2.38 or newer (openfhe==1.6.1.0.24.4): run the coprocessor on one of them with "
            "pip install 'tensafe[openfhe]', or choose --backend cpu"
        ) from None
