"""A real coprocessor that is called in process, and sessions of one attested host with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from services.he_lora.sessions import Session
from tensorguard.ckks.evaluator import Evaluator
from tensorguard.errors import TenSafeError
from tensorguard.session.shared_memory import SharedRegion
from tensorguard.session.stream import SESSION_KEY
from tests.support.coprocessor import ADAPTER, World, running_world
from tests.support.raw_host import PARAMETERS, RawHost


@contextmanager
def fuzzed_world(folder: Path) -> Iterator[World]:
    """Starts an attestor and a coprocessor on the loopback interface; the inputs do not pass through it."""
    with running_world(folder, tokens_per_grant=10**9, tokens_per_release=10**12, max_sessions=4) as world:
        yield world


class _Context:
    """Of an evaluation call, as far as the servicer looks at it."""

    def __init__(self, session_id: bytes) -> None:
        self._session_id = session_id

    def invocation_metadata(self) -> list[tuple[str, bytes]]:
        return [(SESSION_KEY, self._session_id)]

    def set_trailing_metadata(self, metadata: Any) -> None:
        for name, value in metadata:
            assert isinstance(name, str) and isinstance(value, (str, bytes))


class FuzzedCoprocessor:
    """Opens the same session again and again: requests of `host`, which has attached the adapter, fit each of them."""

    def __init__(self, world: World, host: RawHost) -> None:
        assert host.transcript is not None and host.key is not None
        self.servicer = world.coprocessor.servicer
        self.registry = self.servicer._registry
        self.waited = 0.0
        self.registry.clock = lambda: time.monotonic() + self.waited
        self.transcript, self._public_key = host.transcript, host.key.public_key
        self._attested = self.registry.get(self.transcript.session_id).host

    def open_session(
        self, memory: SharedRegion | None = None, around: Callable[[Evaluator], Any] = lambda evaluator: evaluator
    ) -> Session:
        """A completed session with an adapter attached; `around` may put something before its evaluator."""
        transcript, now = self.transcript, self.registry.clock()
        session = Session(transcript, PARAMETERS, self._attested, opened_at=now, used_at=now)
        seed = transcript.pk1_seed(0)
        session.add_key(0, around(Evaluator(PARAMETERS, self._public_key, seed, transcript.session_id)))
        if memory is not None:
            session.share(memory)
        session.attach(ADAPTER)
        self.registry.add(session)
        return session

    def evaluate(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """The answers to one stream of messages, until it ends or is ended."""
        with suppress(TenSafeError):
            yield from self.servicer.Evaluate(messages, _Context(self.transcript.session_id))


def check_reasons(session: Session) -> None:
    """The coprocessor answers every failure in the same way; what was behind it must be a refusal."""
    strange = set(session.refused) - _REASONS
    assert not strange, f"requests failed with {strange}"


def _reasons(kind: type[TenSafeError]) -> Iterator[str]:
    yield kind.reason
    for narrower in kind.__subclasses__():
        yield from _reasons(narrower)


_REASONS = frozenset(_reasons(TenSafeError)) - {"internal"}
