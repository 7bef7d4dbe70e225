from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from services.he_lora.sessions import KEPT_KEYS, PENDING_SECONDS, Session, SessionRegistry
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.errors import InvalidInputError, NotFoundError, RevokedError, UnavailableError
from tensorguard.session.transcript import SessionTranscript


class ClosableEvaluator:
    """What a session needs of an evaluator."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


EVALUATOR: Any = ClosableEvaluator()
HOST: Any = SimpleNamespace(identity=SimpleNamespace(thumbprint="host"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> SessionRegistry:
    return SessionRegistry(limit=2, idle_seconds=100, life_seconds=1000, clock=clock)


def session(clock: Clock, *, completed: bool = True) -> Session:
    transcript = SessionTranscript(
        "t", DEFAULT_PARAMETER_SET, os.urandom(16), os.urandom(32), os.urandom(32), "host", "coprocessor"
    )
    made = Session(transcript, get_parameter_set(DEFAULT_PARAMETER_SET), HOST, clock.now, clock.now)
    if completed:
        made.add_key(0, EVALUATOR)
    return made


def test_a_revoked_host_has_no_sessions_and_gets_none(registry: SessionRegistry, clock: Clock) -> None:
    first = session(clock)
    registry.add(first)
    registry.revoke(["another"])
    assert registry.alive(first)
    registry.revoke(["host"])
    assert first.ended and not registry.alive(first)
    with pytest.raises(RevokedError):
        registry.add(session(clock))


def test_number_of_sessions_is_bounded(registry: SessionRegistry, clock: Clock) -> None:
    first = session(clock)
    registry.add(first)
    registry.add(session(clock))
    with pytest.raises(UnavailableError, match="all 2 sessions"):
        registry.add(session(clock))
    registry.remove(first.transcript.session_id)
    registry.add(session(clock))
    assert len(registry) == 2


def test_unknown_session(registry: SessionRegistry) -> None:
    for name in (b"", b"x" * 16):
        with pytest.raises(NotFoundError):
            registry.get(name)


def test_pending_sessions_expire_soon_and_serve_nothing(registry: SessionRegistry, clock: Clock) -> None:
    pending = session(clock, completed=False)
    registry.add(pending)
    with pytest.raises(NotFoundError, match="no public key"):
        registry.get(pending.transcript.session_id)
    assert registry.get(pending.transcript.session_id, completed=False) is pending
    clock.now = PENDING_SECONDS + 1
    with pytest.raises(NotFoundError):
        registry.get(pending.transcript.session_id, completed=False)
    assert len(registry) == 0


def test_idle_sessions_expire_unless_they_have_a_stream(registry: SessionRegistry, clock: Clock) -> None:
    idle, streaming = session(clock), session(clock)
    streaming.streaming = True
    registry.add(idle)
    registry.add(streaming)
    clock.now = 101
    assert not registry.alive(idle) and registry.alive(streaming)
    clock.now = 1001
    assert not registry.alive(streaming), "no session lives for ever"


def test_use_keeps_a_session(registry: SessionRegistry, clock: Clock) -> None:
    used = session(clock)
    registry.add(used)
    for _ in range(5):
        clock.now += 90
        assert registry.get(used.transcript.session_id) is used


def test_keys_come_in_order_and_old_ones_go(clock: Clock) -> None:
    made = session(clock)
    for number in (0, 2):
        with pytest.raises(InvalidInputError, match="next key number"):
            made.add_key(number, EVALUATOR)
    evaluators: list[Any] = [ClosableEvaluator() for _ in range(5)]
    for number in range(1, 5):
        made.add_key(number, evaluators[number])
    assert sorted(made.keys) == [2, 3, 4] and len(made.keys) == KEPT_KEYS
    with pytest.raises(NotFoundError):
        made.key(1)
    assert made.key(3) is evaluators[3]
    assert sorted(made.keys) == [3, 4], "requests come in order: those below the key in use are over"
    assert [evaluator.closed for evaluator in evaluators[1:]] == [True, True, False, False]


@pytest.mark.parametrize("way", ["remove", "get", "alive", "len"])
def test_an_ended_session_wipes_the_pools_of_its_keys(registry: SessionRegistry, clock: Clock, way: str) -> None:
    ended, evaluators = session(clock, completed=False), [ClosableEvaluator() for _ in range(3)]
    stubs: list[Any] = evaluators
    ended.add_key(0, stubs[0])
    ended.add_key(1, stubs[1])
    registry.add(ended)
    if way == "remove":
        registry.remove(ended.transcript.session_id)
    clock.now = 1001
    if way == "get":
        with pytest.raises(NotFoundError):
            registry.get(ended.transcript.session_id)
    elif way == "alive":
        assert not registry.alive(ended)
    else:
        assert len(registry) == 0
    assert not ended.keys and all(evaluator.closed for evaluator in evaluators[:2])
    ended.add_key(2, stubs[2])
    assert not ended.keys and evaluators[2].closed, "a key that was being announced meanwhile"


def test_handles(clock: Clock) -> None:
    made = session(clock)
    assert [made.attach(name) for name in ("a", "b", "a")] == [0, 1, 0]
    assert made.adapter(1) == "b"
    with pytest.raises(NotFoundError):
        made.adapter(2)
