"""Open sessions: who the host is, which CKKS public keys it announced, which adapters it attached."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.engines import RequestEvaluator
from tensorguard.errors import InvalidInputError, NotFoundError, PermissionDeniedError, RevokedError, UnavailableError
from tensorguard.evidence.result import AttestationResult
from tensorguard.session.shared_memory import SharedRegion
from tensorguard.session.transcript import SessionTranscript

PENDING_SECONDS = 30.0
"""How long a session may stay without a public key."""
KEPT_KEYS = 3
"""The next key is announced ahead, and requests under the previous one may still be on their way then."""


@dataclass(slots=True, eq=False)
class Session:
    """One inference host. Evaluation runs in the thread of its one stream; the lock guards the rest."""

    transcript: SessionTranscript
    parameters: ParameterSet
    host: AttestationResult
    opened_at: float
    used_at: float
    keys: dict[int, RequestEvaluator[Any]] = field(default_factory=dict)
    next_key: int = 0
    handles: list[str] = field(default_factory=list)
    memory: SharedRegion | None = None
    """Shared with the host; for the session's life."""
    streaming: bool = False
    ended: bool = False
    last_request: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by reason."""
    operations: Counter[str] = field(default_factory=Counter)
    """Of the answered requests, by the names of `frames.OperationCounts`."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_key(self, number: int, evaluator: RequestEvaluator[Any]) -> None:
        """Take the next public key; the oldest kept one goes. After `end` the key is dropped at once."""
        with self.lock:
            if number != self.next_key:
                raise InvalidInputError(f"the next key number of this session is {self.next_key}")
            self.keys[number] = evaluator
            self.next_key += 1
            self._drop_below(self.next_key if self.ended else self.next_key - KEPT_KEYS)

    def key(self, number: int) -> RequestEvaluator[Any]:
        """The evaluator of an announced key. Requests come in order, so those below it are not needed any more."""
        with self.lock:
            evaluator = self.keys.get(number)
            if evaluator is None:
                raise NotFoundError("no such key in this session")
            self._drop_below(number)
            return evaluator

    def end(self) -> None:
        """Drop the keys, wipe their pools, and let go of shared memory."""
        with self.lock:
            self.ended = True
            self.memory = None  # the last to use it closes it
            self._drop_below(self.next_key)

    def _drop_below(self, number: int) -> None:
        for old in [known for known in self.keys if known < number]:
            self.keys.pop(old).close()

    def share(self, memory: SharedRegion) -> None:
        """Take the region that frames may refer to: one, before the stream."""
        with self.lock:
            if self.memory is not None or self.streaming:
                raise PermissionDeniedError("memory is shared once, before the session's stream: open another session")
            self.memory = memory

    def attach(self, adapter: str) -> int:
        """The handle of an adapter in this session's frames; the same one when attached again."""
        with self.lock:
            if adapter not in self.handles:
                self.handles.append(adapter)
            return self.handles.index(adapter)

    def adapter(self, handle: int) -> str:
        """The adapter of a handle."""
        with self.lock:
            if handle >= len(self.handles):
                raise NotFoundError("no adapter is attached under this handle")
            return self.handles[handle]


class SessionRegistry:
    """Bounded number of sessions; idle, old and never completed ones expire."""

    def __init__(
        self,
        limit: int,
        idle_seconds: float,
        life_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._idle = idle_seconds
        self._life = life_seconds
        self.clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._revoked: set[str] = set()
        self._lock = threading.Lock()

    def add(self, session: Session) -> None:
        """Raises UnavailableError when all places are taken by living sessions, RevokedError for a revoked host."""
        with self._lock:
            if session.host.identity.thumbprint in self._revoked:
                raise RevokedError("this inference host was revoked; ask whoever runs the attestor")
            self._drop_expired()
            if len(self._sessions) >= self._limit:
                raise UnavailableError(f"all {self._limit} sessions are in use: close one or raise max_sessions")
            self._sessions[session.transcript.session_id] = session

    def get(self, session_id: bytes, *, completed: bool = True) -> Session:
        """A living session. Raises NotFoundError: begin a new one."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None or self._expired(session):
                self._end(session_id)
                raise NotFoundError("no such session (it may have expired): begin a new one")
            if completed and not session.keys:
                raise NotFoundError("the session has no public key yet: complete it first")
            session.used_at = self.clock()
            return session

    def revoke(self, thumbprints: Collection[str]) -> None:
        """End the sessions of these hosts, and open none for them again."""
        with self._lock:
            self._revoked.update(thumbprints)
            for session_id, session in list(self._sessions.items()):
                if session.host.identity.thumbprint in self._revoked:
                    self._end(session_id)

    def remove(self, session_id: bytes) -> None:
        """Forget a session and its keys."""
        with self._lock:
            self._end(session_id)

    def __len__(self) -> int:
        with self._lock:
            self._drop_expired()
            return len(self._sessions)

    def alive(self, session: Session) -> bool:
        """Whether the session may go on; marks it as used."""
        with self._lock:
            present = self._sessions.get(session.transcript.session_id) is session
            if present and self._expired(session):
                self._end(session.transcript.session_id)
                return False
            session.used_at = self.clock()
            return present

    def _expired(self, session: Session) -> bool:
        now = self.clock()
        if not session.keys:
            return now - session.opened_at > PENDING_SECONDS
        # A session with a stream is in use however little it asks; the transport notices hosts that are gone.
        idle = not session.streaming and now - session.used_at > self._idle
        return idle or now - session.opened_at > self._life

    def _drop_expired(self) -> None:
        for session_id in [name for name, session in self._sessions.items() if self._expired(session)]:
            self._end(session_id)

    def _end(self, session_id: bytes) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.end()
