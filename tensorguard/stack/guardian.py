"""Ends process groups when their launcher dies, however it dies.

Run as a script of its own (standard library only, no TenSafe imports). The launcher holds the write end of
standard input and sends one line per group: "+PGID" watches it, "-PGID" forgets it. End of file means that
the launcher is gone: the groups get SIGTERM, and what is left after a grace period gets SIGKILL. A
parent-death signal would be simpler, but it follows the *thread* that started a process and does not reach
grandchildren such as vLLM's engine core.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

GRACE_SECONDS = 25.0
"""An inference service finishes its answers (2 s) and then its engine (15 s)."""


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send(groups: set[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it outlives the launcher on purpose
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    send(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(alive(group) for group in groups):
        time.sleep(0.1)
    send({group for group in groups if alive(group)}, signal.SIGKILL)


if __name__ == "__main__":
    main()
