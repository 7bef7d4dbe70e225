"""The measurement of this installation's own code: what `simulated` evidence reports."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

from tensorguard.errors import ConfigurationError
from tensorguard.evidence import transcript

PACKAGES = ("services", "tensorguard")
_DOMAIN = "tssp-code/v1"


@functools.cache
def code_measurement() -> str:
    """SHA-384 (hex) over the Python sources of the installed `services` and `tensorguard` packages.

    Taken once per process, at the first call: services call it at start, so it describes what they run
    rather than what the disk holds later.
    """
    return measure_packages({name: _package_directory(name) for name in PACKAGES})


def measure_packages(directories: dict[str, Path]) -> str:
    """SHA-384 (hex) over every `*.py` below the directories: name, relative path and content, sorted by path.

    Independent of where the packages are installed, of file times and of compiled caches.
    """
    entries: list[tuple[str, Path]] = []
    for name, directory in directories.items():
        for path in directory.rglob("*.py"):
            relative = path.relative_to(directory)
            if "__pycache__" not in relative.parts:
                entries.append((f"{name}/{relative.as_posix()}", path))
    if not entries:
        raise ConfigurationError("no Python sources to measure; install TenSafe from its wheel or a checkout")
    digest = hashlib.sha384()
    for label, path in sorted(entries):
        digest.update(transcript.encode(_DOMAIN, label, hashlib.sha384(path.read_bytes()).digest()))
    return digest.hexdigest()


def _package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"package {name} is not installed, so this code cannot be measured")
    return Path(next(iter(spec.submodule_search_locations)))
