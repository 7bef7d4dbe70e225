"""Engines by the name a setting gives them."""

from __future__ import annotations

from typing import Any

from tensorguard.engines.cpu import CpuEngine
from tensorguard.engines.interface import Engine
from tensorguard.engines.openfhe.engine import OpenFheEngine
from tensorguard.errors import ConfigurationError

BACKENDS = ("cpu", "openfhe")


def load_engine(name: str) -> Engine[Any]:
    """The engine of this name. Raises ConfigurationError if there is none, or if it cannot run here."""
    if name == "cpu":
        return CpuEngine()
    if name == "openfhe":
        return OpenFheEngine.load()
    raise ConfigurationError(f"unknown backend {name!r:.40}; choose one of {', '.join(BACKENDS)}")
