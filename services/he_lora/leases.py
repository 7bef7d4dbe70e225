"""Keeps leases alive: renews at half of their time, drops what cannot be renewed, opens it again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from services.he_lora.adapters import LEASE_OVER, AdapterStore, ServedAdapter
from tensorguard.errors import BudgetExhaustedError, LeaseExpiredError, RevokedError, TenSafeError

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_LEAST_PAUSE_SECONDS = 0.1
_LOW_SHARE = 0.25
"""A lease is also renewed when less than this share of what it had after the last renewal is left."""


class LeaseKeeper:
    """One background thread for one adapter.

    Tokens used are reported with every renewal. Without a renewal the adapter's weights are forgotten when
    the lease ends; the package is then opened again, with fresh evidence and a fresh lease, as soon as the
    attestor allows.
    """

    def __init__(
        self,
        store: AdapterStore,
        adapter: ServedAdapter,
        open_again: Callable[[], ServedAdapter],
        tokens_per_lease: int,
        clock: Callable[[], float] = time.time,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        self._store = store
        self._adapter: ServedAdapter | None = adapter
        self._name = adapter.name
        self._open_again = open_again
        self._tokens = tokens_per_lease
        self._clock = clock
        self._retry = self._reopen_pause = retry_seconds
        self._stop = threading.Event()
        self._revoked: RevokedError | None = None
        self._revocations = 0
        self._set_marks(adapter)
        self._thread = threading.Thread(target=self._run, name=f"lease-{adapter.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, report the tokens used so far and wait for the thread."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        if self._adapter is not None and not self._adapter.meter.expired:
            self._renew(self._adapter, more=False)

    def serves(self, package_id: str, sequence: int) -> bool:
        """Whether the adapter is of this package and, unless that is 0, this sequence."""
        adapter = self._adapter
        return self._name == package_id and (adapter is None or sequence in (0, adapter.sequence))

    def revoke(self, cause: RevokedError) -> None:
        """Serve the adapter no longer; who asks for it gets `cause`. Called by any thread."""
        self._revoked = cause
        self._revocations += 1
        adapter = self._adapter
        if adapter is not None:
            adapter.meter.end()
        self._store.drop(self._name, cause)

    def step(self) -> float:
        """Do what is due; seconds until the next look."""
        if self._adapter is None:
            return self._reopen()
        meter = self._adapter.meter
        if meter.expired:
            cause = self._revoked or LeaseExpiredError(LEASE_OVER)
            log.error("lease over, adapter dropped", adapter=self._name, reason=cause.reason)
            self._store.drop(self._name, cause)
            self._adapter = None
            return 0.0
        now, expires = self._clock(), meter.terms.expires_at
        half = self._renewed_at + (expires - self._renewed_at) / 2
        if now < half and meter.left >= self._low_mark:
            return min(half - now, _LOOK_SECONDS)
        # After a failure at half of what is left, so that the next attempts come before the end.
        pause = min(self._retry, max(_LEAST_PAUSE_SECONDS, (expires - now) / 2))
        return 0.0 if self._renew(self._adapter, more=True) else pause

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                pause = self.step()
            except Exception as error:  # the thread must live: without it the lease silently ends
                log.error("lease keeper failed", adapter=self._name, error_type=type(error).__name__)
                pause = self._retry
            self._stop.wait(max(pause, 0.02))

    def _set_marks(self, adapter: ServedAdapter) -> None:
        self._renewed_at = self._clock()
        self._low_mark = _LOW_SHARE * min(adapter.meter.left, self._tokens)

    def _renew(self, adapter: ServedAdapter, *, more: bool) -> bool:
        meter = adapter.meter
        wanted = max(0, self._tokens - meter.left) if more else 0
        try:
            meter.renewed(adapter.workload.renew(meter.terms.lease_id, tokens_used=meter.used, tokens_wanted=wanted))
        except RevokedError as error:
            self.revoke(error)
            return False
        except LeaseExpiredError:
            meter.end()
            return False
        except TenSafeError as error:
            log.warning("lease not renewed", adapter=self._name, reason=error.reason, cause=error.message)
            return False
        self._set_marks(adapter)
        log.info("lease renewed", adapter=self._name, tokens_left=meter.left)
        return True

    def _reopen(self) -> float:
        before = self._revocations
        try:
            adapter = self._open_again()
        except TenSafeError as error:
            if isinstance(error, (BudgetExhaustedError, RevokedError)):
                self._store.drop(self._name, error)
            log.warning("adapter not opened again", adapter=self._name, reason=error.reason, cause=error.message)
            self._reopen_pause = min(2 * self._reopen_pause, _LONGEST_RETRY_SECONDS)
            return self._reopen_pause
        self._reopen_pause = self._retry
        self._store.put(adapter)
        self._adapter = adapter
        if self._revoked is not None and self._revocations != before:  # while it was being opened
            self.revoke(self._revoked)
        else:
            self._revoked = None
        self._set_marks(adapter)
        log.info("adapter opened again", adapter=self._name)
        return 0.0
