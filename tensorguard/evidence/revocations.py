"""Follows the attestor's revocations, for a workload that has to end what they concern."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from tensorguard.errors import RevokedError, TenSafeError, TokenError
from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.workload import Workload

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 2.0


class RevocationFollower:
    """One background thread. While the attestor cannot be reached, the end of leases and tokens has to do instead."""

    def __init__(
        self,
        workload: Workload,
        apply: Callable[[RevocationNotice], None],
        *,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """`workload`: one without a package, so that whatever it is refused for as revoked is the workload itself, its
        code or its machine.

        `apply` is called, from the thread, with every notice, and with one that names the workload when the attestor
        refuses it as revoked. It may be called again for the same.
        """
        self._workload = workload
        self._apply = apply
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

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except TenSafeError as error:
                if not self._stop.is_set():
                    log.warning("revocations not followed", reason=error.reason, cause=error.message)
                self._stop.wait(self._retry)
            except Exception as error:  # the thread must live: without it revocations wait for the lease's end
                log.error("revocation follower failed", error_type=type(error).__name__)
                self._stop.wait(self._retry)

    def _follow(self) -> None:
        """Returns when the stream ends with its token."""
        try:
            for notice in self._workload.watch_revocations(self._seen):
                log.warning("revocation", number=notice.number, package=notice.package_id)
                self._apply(notice)
                self._seen = max(self._seen, notice.number)
        except TokenError:
            self._seen = 0  # the attestor's database may have been set back, and the numbers in it
            raise
        except RevokedError:
            self._apply(RevocationNotice(self._seen, workloads=(self._workload.identity.public.thumbprint,)))
            raise
