"""Tokens charged per adapter release, and the lease they are charged under."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from tensorguard.errors import BudgetExhaustedError, LeaseExpiredError
from tensorguard.evidence.release import LeaseTerms
from tensorguard.observability.metrics import TOKENS


class TokenMeter:
    """Charges the maximum over (layer, group) of the tokens that passed through it, over all sessions.

    One token visits each group of each layer, and what a host learns about a group's weights grows with the
    tokens that this group saw: so a host that sends more tokens through one group than through the others
    pays for that group. Charged before the evaluation and never given back. A restarted process counts from
    zero under a new lease, while the attestor keeps the sum of what was reported: never less than the true
    maximum.
    """

    def __init__(self, terms: LeaseTerms, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._terms = terms
        self._seen: dict[tuple[int, str], int] = {}
        self._used = 0
        self._base = 0

    def charge(self, layer: int, group: str, tokens: int) -> None:
        """Charge `tokens` to a group, or refuse: LeaseExpiredError, BudgetExhaustedError."""
        with self._lock:
            # Whoever looked the adapter up has asked before; what counts is the moment of the charge.
            if self._clock() >= self._terms.expires_at:
                raise LeaseExpiredError("the lease is over")
            seen = self._seen.get((layer, group), 0) + tokens
            increase = max(0, seen - self._used)
            if self._used - self._base + increase > self._terms.tokens_granted:
                raise BudgetExhaustedError("the token budget under this lease is spent")
            self._seen[layer, group] = seen
            self._used += increase
        if increase:
            TOKENS.labels("charged").inc(increase)

    def renewed(self, terms: LeaseTerms) -> None:
        """Go on under new terms. Another lease id starts its own count of used tokens."""
        with self._lock:
            if terms.lease_id != self._terms.lease_id:
                self._base = self._used
            self._terms = terms

    def end(self) -> None:
        """The attestor says the lease is over, whatever the clock says."""
        with self._lock:
            self._terms = replace(self._terms, expires_at=0)

    @property
    def terms(self) -> LeaseTerms:
        """The present lease."""
        with self._lock:
            return self._terms

    @property
    def used(self) -> int:
        """Tokens charged under the present lease."""
        with self._lock:
            return self._used - self._base

    @property
    def total(self) -> int:
        """Tokens charged by this meter under all its leases."""
        with self._lock:
            return self._used

    @property
    def left(self) -> int:
        """Tokens that may still be charged under the present lease."""
        with self._lock:
            return max(0, self._terms.tokens_granted - (self._used - self._base))

    @property
    def expired(self) -> bool:
        """True once nothing may be charged any more."""
        with self._lock:
            return self._clock() >= self._terms.expires_at
