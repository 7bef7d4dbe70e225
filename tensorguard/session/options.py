"""Limits and times of a session."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Limits and times of a session.

    tokens_per_key: a CKKS key is replaced before more rows than this have passed through any one group of any one
    adapter under it; one call of more rows gets a key that its group has not used yet. A coprocessor that forges
    responses and sees what the model then says learns on the order of a bit about the key per generated token; the
    ternary key has 6,492 bits of entropy, so a key that serves 2,048 rows (256 tokens for each of eight sequences in
    flight) is gone long before it could be found. The next key is announced when three quarters are used,
    so that the change costs nothing.
    pool_bytes: encryptions of zero made ahead, for each key, in idle time; twice that while the next key's pool fills.
    0 makes every one when it is needed.
    frame_bytes: requests are cut into frames of about this size, so that the coprocessor starts before all is sent.
    checked: every frame carries one more row, a secret combination of its others, that must fit the response: finds
    responses changed in one token. The row is sent, charged and counted for `tokens_per_key` like any other.
    reattest_seconds: an older session is replaced, with fresh evidence, when nothing is in flight.
    silence_seconds: a coprocessor that answers no HTTP/2 ping for so long (stopped, or cut off) is given up, and every
    delta that waits for it fails; one that computes answers them, however long it computes. At least 1. A proxy that
    ends HTTP/2 answers in the coprocessor's place: then `reply_seconds`, or whatever the caller waits, is the limit.
    shared_memory_bytes: size of the memory shared with a coprocessor on a loopback address, so that frames need not go
    through the socket; 0 turns it off. Whole pages of 4096 bytes. Frames that find no room in it go inline.
    """

    connect_seconds: float = 5.0
    reconnect_seconds: float = 1.0
    call_seconds: float = 10.0
    reply_seconds: float = 30.0
    silence_seconds: float = 2.0
    tokens_per_key: int = 2048
    pool_bytes: int = 32 << 20
    frame_bytes: int = 1 << 20
    checked: bool = False
    reattest_seconds: float = 1800.0
    first_backoff_seconds: float = 0.25
    longest_backoff_seconds: float = 8.0
    shared_memory_bytes: int = 16 << 20
