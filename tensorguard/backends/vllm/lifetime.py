"""An engine process ends with the process that started it, however that one ended."""

from __future__ import annotations

import os
import threading
import time

_watching = threading.Lock()


def exit_with_parent(interval: float = 1.0) -> None:
    """Watch the parent process from a daemon thread and exit when it is gone. Calling again does nothing.

    vLLM starts its processes as daemons of the caller, which ends them when the caller exits by itself, but
    not when it is killed.
    """
    if not _watching.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
