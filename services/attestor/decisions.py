"""Every decision of the attestor is in the audit log before anyone learns of it.

A decision and what it changes are committed together. Refusals of callers who have proved nothing are bounded: beyond
a rate for each peer and for all, they are counted, and one record tells the counts later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from sqlalchemy import Connection

from services.attestor.rate_limits import Rate, RateLimiter
from tensorguard.errors import TenSafeError
from tensorguard.store.audit import AuditLog

log = structlog.get_logger(__name__)

_LONGEST_TEXT = 200
_PEER_RATE = Rate(per_second=0.2, burst=20)
_OVERALL_RATE = Rate(per_second=1, burst=200)
_COUNTS_SECONDS = 60.0
_MOST_COUNTS = 50


class Decision:
    """One decision while it is made. Put nothing secret into its fields."""

    def __init__(self, audit: AuditLog, event: str, peer: str) -> None:
        self._audit = audit
        self.event = event
        self.peer = peer
        self.authenticated = False
        """Whether the caller has proved possession of an attested key."""
        self.fields: dict[str, Any] = {}

    def update(self, **fields: object) -> None:
        """Set fields of the record."""
        for name, value in fields.items():
            self.fields[name] = value[:_LONGEST_TEXT] if isinstance(value, str) else value

    @contextlib.contextmanager
    def accepting(self) -> Iterator[Connection]:
        """The transaction that commits the decision's changes with its record. The answer comes after it.

        What raises in the block refuses the request, and undoes the changes.
        """
        with self._audit.recording(self.event, self.fields) as connection:
            yield connection
            self.update(decision="accepted", reason="", detail="")
        log.info("decided", kind=self.event, decision="accepted")


class Decisions:
    """Makes decisions that are recorded."""

    def __init__(self, audit: AuditLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._limiter = RateLimiter(_PEER_RATE, _OVERALL_RATE, clock=clock)
        self._lock = threading.Lock()
        self._unrecorded: Counter[tuple[str, str, str]] = Counter()
        self._counted_since = clock()

    @contextlib.contextmanager
    def deciding(self, event: str, peer: str) -> Iterator[Decision]:
        """A decision for the host `peer`. The block has to leave through `accepting`, or raise."""
        decision = Decision(self._audit, event, peer)
        try:
            yield decision
        except TenSafeError as error:
            self._refused(decision, "refused", error.reason, getattr(error, "detail", ""))
            raise
        except BaseException:
            self._refused(decision, "failed", "internal", "")
            raise

    def flush(self) -> None:
        """Record the counts of refusals that have no record of their own."""
        with self._lock:
            counts, self._unrecorded = self._unrecorded, Counter()
            self._counted_since = self._clock()
        if counts:
            entries = [
                {"event": event, "reason": reason, "detail": detail, "count": count}
                for (event, reason, detail), count in counts.most_common(_MOST_COUNTS)
            ]
            self._audit.append("refusals", {"counts": entries, "total": counts.total()})

    def _refused(self, decision: Decision, outcome: str, reason: str, detail: str) -> None:
        log.info("decided", kind=decision.event, decision=outcome, reason=reason, detail=detail)
        if decision.authenticated or self._limiter.admit(decision.peer):
            decision.update(decision=outcome, reason=reason, detail=detail)
            self._audit.append(decision.event, decision.fields)
        else:
            with self._lock:
                self._unrecorded[decision.event, reason, detail] += 1
        if self._clock() - self._counted_since > _COUNTS_SECONDS:
            self.flush()
