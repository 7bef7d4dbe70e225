"""When keys are replaced, announced ahead and wiped. The keys are real; announcing is not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import HostSession, Plan, get_parameter_set
from tensorguard.errors import UnavailableError
from tensorguard.session.keys import KeySchedule, LinkKey

PARAMETERS = get_parameter_set("n4096-q90-w12")
GROUP, OTHER = ("adapter", 0, "qkv"), ("adapter", 1, "o")


class Announcer:
    """Makes keys and remembers them, with the thread that asked. Waits for `go` and raises `error`, if set."""

    def __init__(self) -> None:
        self.keys: list[LinkKey] = []
        self.threads: list[str] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def __call__(self) -> LinkKey:
        self.threads.append(threading.current_thread().name)
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        host = HostSession.create(PARAMETERS, os.urandom(32), b"session", pool_bytes=1 << 20)
        host.pool.fill()
        self.keys.append(LinkKey(len(self.keys), host))
        return self.keys[-1]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def announcer() -> Announcer:
    return Announcer()


@pytest.fixture
def schedule(announcer: Announcer) -> KeySchedule:
    return KeySchedule(announcer, tokens_per_key=100)


def prepared(schedule: KeySchedule) -> bool:
    return schedule._next is not None and schedule._next.done()


def test_the_next_key_is_announced_in_the_background_at_three_quarters(
    schedule: KeySchedule, announcer: Announcer
) -> None:
    assert schedule.key_for(GROUP, 74).number == 0
    assert schedule.key_for(OTHER, 74).number == 0
    assert schedule._next is None
    assert schedule.key_for(GROUP, 1).number == 0
    until(lambda: prepared(schedule))
    for _ in range(25):
        assert schedule.key_for(GROUP, 1).number == 0
    announcer.go.clear()  # announcing would hang from here on: the next key is there already
    assert schedule.key_for(GROUP, 1).number == 1
    assert announcer.threads == ["MainThread", "he-lora-next-key"]
    assert [key.used for key in announcer.keys] == [{GROUP: 100, OTHER: 74}, {GROUP: 1}]
    schedule.close()


def test_a_key_that_ends_before_the_next_is_ready_waits_for_it(schedule: KeySchedule, announcer: Announcer) -> None:
    announcer.go.clear()
    schedule.key_for(GROUP, 90)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(schedule.key_for, GROUP, 20)
        time.sleep(0.05)
        assert not waiting.done() and announcer.keys[0].used[GROUP] == 90
        announcer.go.set()
        assert waiting.result(30).number == 1
    assert len(announcer.threads) == 2, "announced once"
    schedule.close()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([GROUP, OTHER]), st.integers(1, 130)), max_size=12))
def test_no_key_is_used_beyond_its_bound(calls: list[tuple[tuple[str, int, str], int]]) -> None:
    announcer = Announcer()
    schedule = KeySchedule(announcer, tokens_per_key=100)
    for group, tokens in calls:
        key = schedule.key_for(group, tokens)
        assert key is schedule.current is announcer.keys[key.number]
        # Only a call that is larger by itself goes over, alone under a key that its group had not used.
        assert key.used[group] <= 100 or key.used[group] == tokens
    schedule.close()
    until(lambda: len(announcer.keys) == len(announcer.threads) and all(key.host.closed for key in announcer.keys))


def test_replaced_keys_only_decrypt_and_then_go(schedule: KeySchedule, announcer: Announcer) -> None:
    schedule.key_for(GROUP, 100)
    schedule.key_for(GROUP, 100)
    first, second = announcer.keys[:2]
    assert first.host.pool.closed and len(first.host.pool) == 0, "its encryptions of zero are wiped at once"
    assert not first.host.closed, "answers to requests under it may be on their way"
    assert not second.host.pool.closed
    schedule.key_for(GROUP, 100)
    assert first.host.closed and not second.host.closed and second.host.pool.closed
    schedule.close()


def test_closing_wipes_every_key_and_pool(schedule: KeySchedule, announcer: Announcer) -> None:
    schedule.key_for(GROUP, 100)
    schedule.key_for(GROUP, 80)
    until(lambda: prepared(schedule))
    zeros = [zero for key in announcer.keys for zero in key.host.pool._ready]
    assert len(announcer.keys) == 3 and len(zeros) == 2
    schedule.close()
    for key in announcer.keys:
        assert key.host.closed and key.host.pool.closed and not any(part.any() for part in key.host._keys)
    assert not any(zero.b.any() for zero in zeros)


def test_a_key_that_is_made_while_the_link_ends_is_wiped(schedule: KeySchedule, announcer: Announcer) -> None:
    announcer.go.clear()
    schedule.key_for(GROUP, 80)
    schedule.close()
    announcer.go.set()
    until(lambda: len(announcer.keys) == 2 and announcer.keys[1].host.closed)
    with pytest.raises(UnavailableError):
        schedule.key_for(GROUP, 80)


def test_a_failure_to_announce_is_raised_when_the_key_ends_and_not_tried_again(
    schedule: KeySchedule, announcer: Announcer
) -> None:
    announcer.error = UnavailableError("no coprocessor")
    schedule.key_for(GROUP, 80)
    until(lambda: prepared(schedule))
    host = schedule.key_for(GROUP, 20).host
    assert host.encrypt(np.ones((1, 8)), Plan(1, 8, 1), 4096.0).pooled == 1, "the current key serves to its end"
    for _ in range(2):
        with pytest.raises(UnavailableError, match="no coprocessor"):
            schedule.key_for(GROUP, 1)
    assert len(announcer.threads) == 2
    schedule.close()
    assert host.closed
