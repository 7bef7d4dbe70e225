from __future__ import annotations

import os
import signal
import threading

import pytest

from tensorguard.ckks.parallel import split


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 64])
def test_every_part_is_done_once(threads: int, count: int) -> None:
    done: list[int] = []
    split(threads, count, lambda first, end: done.extend(range(first, end)))
    assert sorted(done) == list(range(count))


def test_parts_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    split(2, 2, lambda first, end: meeting.wait())


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_part_that_fails_fails_the_call_after_the_others_have_ended(failing: int) -> None:
    ended = []

    def work(first: int, end: int) -> None:
        if first == failing:
            raise ValueError("broken part")
        ended.append(first)

    with pytest.raises(ValueError, match="broken part"):
        split(3, 3, work)
    assert sorted(ended) == sorted({0, 1, 2} - {failing})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    split(2, 2, lambda first, end: None)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child without threads would wait forever
        done: list[int] = []
        split(2, 2, lambda first, end: done.append(first))
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
