"""The follower hands on every notice once, asks again from where it was, and notices its own revocation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorguard.errors import RevokedError, TenSafeError, TokenError, UnavailableError
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.revocations import RevocationFollower

Stream = list[RevocationNotice | Exception]


class Workload:
    """Its streams are lists: notices, and what ends them. Behind the last one nothing ever comes."""

    def __init__(self, *streams: Stream) -> None:
        self.identity = WorkloadIdentity.generate()
        self.streams = list(streams)
        self.asked: list[int] = []
        self.idle = threading.Event()

    def watch_revocations(self, after: int) -> Iterator[RevocationNotice]:
        self.asked.append(after)
        if not self.streams:
            self.idle.set()
            time.sleep(0.01)
            return
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def follow(workload: Workload, apply: Callable[[RevocationNotice], None], condition: Callable[[], bool]) -> None:
    given: Any = workload
    follower = RevocationFollower(given, apply, retry_seconds=0.01)
    follower.start()
    try:
        wait_for(condition)
    finally:
        follower.stop()


def test_it_asks_again_behind_the_last_notice_whatever_ended_the_stream() -> None:
    first, second, third = (RevocationNotice(number, "package") for number in (1, 2, 5))
    workload = Workload([first], [second, UnavailableError("gone")], [OSError("a defect")], [third])
    seen: list[RevocationNotice] = []
    follow(workload, seen.append, workload.idle.is_set)
    assert seen == [first, second, third]
    assert workload.asked[:5] == [0, 1, 2, 2, 5]


def test_an_attestor_that_has_forgotten_its_token_is_asked_for_all() -> None:
    """Its database was set back: the next revocation may have a number that was seen before."""
    before, after = RevocationNotice(3, "package", 1), RevocationNotice(2, "package", 2)
    workload = Workload([before], [TokenError("no record of this token")], [after])
    seen: list[RevocationNotice] = []
    follow(workload, seen.append, workload.idle.is_set)
    assert seen == [before, after]
    assert workload.asked[:4] == [0, 3, 0, 2]


def test_a_notice_that_could_not_be_applied_comes_again() -> None:
    notice = RevocationNotice(1, "package")
    seen: list[RevocationNotice] = []

    def fails_first(given: RevocationNotice) -> None:
        seen.append(given)
        if len(seen) == 1:
            raise RuntimeError("a defect")

    workload = Workload([notice], [notice])
    follow(workload, fails_first, workload.idle.is_set)
    assert seen == [notice, notice] and workload.asked[:3] == [0, 0, 1]


def test_a_workload_that_is_refused_as_revoked_is_told_so() -> None:
    workload = Workload([RevocationNotice(3, "package"), RevokedError("this chip was revoked")])
    seen: list[RevocationNotice] = []
    follow(workload, seen.append, workload.idle.is_set)
    assert seen[1:] == [RevocationNotice(3, workloads=(workload.identity.public.thumbprint,))]


@pytest.mark.parametrize("error", [UnavailableError("attestor gone"), TenSafeError("another")])
def test_other_refusals_are_no_revocation(error: TenSafeError) -> None:
    workload = Workload([error])
    seen: list[RevocationNotice] = []
    follow(workload, seen.append, workload.idle.is_set)
    assert seen == [] and workload.asked[:2] == [0, 0]
