"""The targets by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz.evidence_target import EVIDENCE_TARGETS
from fuzz.frames_target import frames_target
from fuzz.manifest_target import manifest_target
from fuzz.sessions_target import sessions_target
from fuzz.shared_memory_target import shared_memory_target
from fuzz.target import Target

TARGETS = ("frames", "sessions", "shared_memory", "manifest", *EVIDENCE_TARGETS)


@contextmanager
def open_target(name: str, folder: Path) -> Iterator[Target]:
    """A target of `TARGETS`; what it needs on disk goes below `folder`."""
    if name == "frames":
        yield frames_target()
    elif name in EVIDENCE_TARGETS:
        yield EVIDENCE_TARGETS[name]()
    elif name == "manifest":
        yield manifest_target()
    elif name == "sessions":
        with sessions_target(folder) as target:
            yield target
    elif name == "shared_memory":
        with shared_memory_target(folder) as target:
            yield target
    else:
        raise ValueError(f"no target {name!r}: choose one of {', '.join(TARGETS)}")
