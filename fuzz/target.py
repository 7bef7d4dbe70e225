"""What is fuzzed: something that takes any bytes and must answer with a value or a TenSafe error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """`run` takes one input and raises whatever is a finding: any exception."""

    name: str
    seeds: Iterable[bytes]
    """Inputs to begin with, beside those in fuzz/corpus."""
    run: Callable[[bytes], None]

    def corpus(self) -> list[bytes]:
        """The kept inputs, oldest name first, and the seeds."""
        folder = CORPUS / self.name
        kept = [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []
        return [*self.seeds, *kept]
