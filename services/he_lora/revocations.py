"""Follows the attestor's revocations, and ends what they concern at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import structlog

from services.he_lora.leases import LeaseKeeper
from services.he_lora.sessions import SessionRegistry
from tensorguard.errors import RevokedError, TenSafeError
from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.workload import Workload

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 2.0


class RevocationFollower:
    """One background thread. While the attestor cannot be reached, leases end what was revoked instead."""

    def __init__(
        self,
        workload: Workload,
        keepers: Sequence[LeaseKeeper],
        sessions: SessionRegistry,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        self._workload = workload
        self._keepers = keepers
        self._sessions = sessions
        self._retry = retry_seconds
        self._seen = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="revocations", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Follow no longer. A stream that is open ends with the client's channel."""
        self._stop.set()

    def apply(self, notice: RevocationNotice) -> None:
        """Drop the adapters and close the sessions that a notice concerns."""
        self._seen = max(self._seen, notice.number)
        own = self._workload.identity.public.thumbprint in notice.workloads
        self._sessions.revoke(notice.workloads)
        for keeper in self._keepers:
            if own:
                keeper.revoke(RevokedError("this coprocessor was revoked; ask whoever runs the attestor"))
            elif keeper.serves(notice.package_id, notice.sequence):
                keeper.revoke(RevokedError("this adapter release was revoked by its owner"))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for notice in self._workload.watch_revocations(self._seen):
                    log.warning("revocation", number=notice.number, package=notice.package_id)
                    self.apply(notice)
            except TenSafeError as error:
                if not self._stop.is_set():
                    log.warning("revocations not followed", reason=error.reason, cause=error.message)
                self._stop.wait(self._retry)
            except Exception as error:  # the thread must live: without it revocations wait for the lease's end
                log.error("revocation follower failed", error_type=type(error).__name__)
                self._stop.wait(self._retry)
