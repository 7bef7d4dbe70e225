"""What a session did, in bytes, seconds and counts. Nothing here depends on what was computed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tensorguard.session.frames import OperationCounts


@dataclass(slots=True)
class SessionStats:
    """Totals since the session was made, over all reconnects. Written by several threads under `lock`."""

    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Time the waiting thread slept: what did not overlap with the base product."""
    decrypt_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    """As the coprocessor reports it."""
    calls: int = 0
    tokens: int = 0
    """Rows of activations, summed over layers and groups."""
    failures: int = 0
    ciphertexts_pooled: int = 0
    ciphertexts_in_line: int = 0
    """Ciphertexts sent, by where their encryption of zero came from: the pool, or made by the call itself."""
    ntt: int = 0
    products: int = 0
    additions: int = 0
    rerandomisations: int = 0
    modulus_switches: int = 0
    rotations: int = 0
    key_switches: int = 0
    evaluation_key_bytes: int = 0
    """The last three do not exist in the protocol: a response that reports one is refused. They stay 0."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to some of the totals at once."""
        with self.lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def count(self, operations: OperationCounts) -> None:
        """Add one evaluation's operations."""
        self.add(**operations._asdict())

    def snapshot(self) -> dict[str, float]:
        """The totals as a plain mapping."""
        with self.lock:
            return {name: getattr(self, name) for name in self.__slots__ if name != "lock"}
