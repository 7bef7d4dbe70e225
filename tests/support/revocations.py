"""Revokes as `tensafe revoke` does it, and waits for what follows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.workload import Workload
from tensorguard.store.revocations import Subject, revoke
from tensorguard.store.state import AttestorState

SECONDS = 5.0
"""Within which a revocation must be enforced."""


def revoke_now(state_dir: Path, subject: Subject) -> None:
    """On the attestor's database, beside the attestor that runs on it."""
    with (
        AttestorState.open(state_dir) as state,
        state.audit.recording("revoke", {"kind": subject.kind.value}) as connection,
    ):
        revoke(connection, subject, "", int(time.time()))


def first_notice(workload: Workload) -> queue.Queue[RevocationNotice]:
    """What the attestor tells `workload` first, as soon as it does: `get(timeout=SECONDS)`."""
    notices: queue.Queue[RevocationNotice] = queue.Queue()
    threading.Thread(target=lambda: notices.put(next(workload.watch_revocations(0))), daemon=True).start()
    time.sleep(1.0)  # who asks only after it was revoked is refused, and told nothing
    return notices


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it is true, for as long as a revocation may take."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "not enforced in time"
        time.sleep(0.05)
