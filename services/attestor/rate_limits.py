"""Token buckets: how often each peer, and all of them together, may do something."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_PEERS = 4096
"""Peers remembered; with more, those seen longest ago begin anew, and the rate over all of them still holds."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second in the long run, and so many at once."""

    per_second: float
    burst: float


class _Bucket:
    __slots__ = ("filled_at", "left")

    def __init__(self, left: float, filled_at: float) -> None:
        self.left, self.filled_at = left, filled_at

    def fill(self, rate: Rate, now: float) -> float:
        self.left = min(rate.burst, self.left + (now - self.filled_at) * rate.per_second)
        self.filled_at = now
        return self.left


class RateLimiter:
    """Safe for threads."""

    def __init__(self, per_peer: Rate, overall: Rate, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_peer, self._overall, self._clock = per_peer, overall, clock
        self._lock = threading.Lock()
        self._all = _Bucket(overall.burst, clock())
        self._peers: OrderedDict[str, _Bucket] = OrderedDict()

    def admit(self, peer: str) -> bool:
        """Whether `peer` may do it once more now."""
        now = self._clock()
        with self._lock:
            bucket = self._peers.pop(peer, None) or _Bucket(self._per_peer.burst, now)
            self._peers[peer] = bucket  # at the end: seen last
            if len(self._peers) > _PEERS:
                self._peers.popitem(last=False)
            if bucket.fill(self._per_peer, now) < 1 or self._all.fill(self._overall, now) < 1:
                return False
            bucket.left -= 1
            self._all.left -= 1
            return True


def peer_host(peer: str) -> str:
    """The host in gRPC's name of a peer ("ipv4:192.0.2.1:5000"): a new connection is no new peer."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
