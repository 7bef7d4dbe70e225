"""Engines by the name a setting gives them."""

from __future__ import annotations

from typing import Any

from tensorguard.engines.cpu import CpuEngine
from tensorguard.engines.interface import Engine, EngineOptions
from tensorguard.engines.openfhe.engine import OpenFheEngine
from tensorguard.errors import ConfigurationError

BACKENDS = ("cpu", "openfhe")


def load_engine(name: str, options: EngineOptions | None = None) -> Engine[Any]:
    """The engine of this name. Raises ConfigurationError if there is none, or if it cannot run here like this."""
    options = options or EngineOptions()
    if name == "cpu":
        return CpuEngine(options)
    if name == "openfhe":
        if options.threads != 1:
            raise ConfigurationError("OpenFHE serves one request at a time in one thread: leave threads at 1")
        return OpenFheEngine.load()
    raise ConfigurationError(f"unknown backend {name!r:.40}; choose one of {', '.join(BACKENDS)}")
