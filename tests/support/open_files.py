"""What a process has open or mapped, as the kernel sees it."""

from __future__ import annotations

import re
from pathlib import Path


def open_files(pid: int) -> list[str]:
    """What its descriptors lead to; of a file that has no name any more, the last one and "(deleted)"."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:  # closed since
            continue
    return found


def shared_memory_of(pid: int) -> set[Path]:
    """Names of shared memory that it has open or mapped, whether or not they are still there."""
    text = "\n".join([*open_files(pid), Path(f"/proc/{pid}/maps").read_text()])
    return {Path(name) for name in re.findall(r"/dev/shm/\S+", text)}
