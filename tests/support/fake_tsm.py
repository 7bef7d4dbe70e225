"""A configfs-tsm tree on an ordinary file system: what the kernel does when a request is made, written and removed."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tensorguard.evidence import configfs_tsm


@dataclass
class FakeTsm:
    """Answers with `prefix` and the SHA-256 of the report data. Fields are the ways in which a machine can be wrong."""

    root: Path
    provider: str = "tdx_guest\n"
    auxblob: bytes | None = None
    outblob: bytes | None = None
    writes: int = 1
    """Writes that the kernel counts for one of ours."""
    refuses: bool = False
    requests: list[bytes] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeTsm:
        self.root.mkdir(parents=True)
        make, write = Path.mkdir, os.write

        def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
            make(path, *arguments, **options)
            if path.parent == self.root:
                self._begin(path)

        def fake_write(descriptor: int, data: bytes) -> int:
            entry = Path(f"/proc/self/fd/{descriptor}").readlink().parent
            count = write(descriptor, data)
            if entry.parent == self.root:
                self._answer(entry, data)
            return count

        def rmdir(path: Path) -> None:
            shutil.rmtree(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        monkeypatch.setattr(configfs_tsm.os, "write", fake_write)
        return self

    def _begin(self, entry: Path) -> None:
        (entry / "provider").write_text(self.provider)
        (entry / "generation").write_text("0\n")
        (entry / "inblob").write_bytes(b"")

    def _answer(self, entry: Path, data: bytes) -> None:
        if self.refuses:
            return
        self.requests.append(data)
        (entry / "generation").write_text(f"{self.writes}\n")
        (entry / "outblob").write_bytes(expected(data) if self.outblob is None else self.outblob)
        if self.auxblob is not None:
            (entry / "auxblob").write_bytes(self.auxblob)


def expected(report_data: bytes) -> bytes:
    """The fake's report."""
    return b"report over " + hashlib.sha256(report_data).digest()
