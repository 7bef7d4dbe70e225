from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import REGISTRY

from tensorguard.ckks.filler import Filler
from tensorguard.ckks.idle import ProcessorUse
from tensorguard.ckks.pool import Pool
from tensorguard.errors import ConfigurationError, InvalidInputError, UnavailableError

SIZE = 10


@dataclass(eq=False)
class Item:
    number: int
    wiped: bool = False

    def wipe(self) -> None:
        self.wiped = True


class Maker:
    """Makes numbered items and remembers all of them."""

    def __init__(self) -> None:
        self.made: list[Item] = []
        self._numbers = count()

    def __call__(self) -> Item:
        item = Item(next(self._numbers))
        self.made.append(item)
        return item


def make_pool(make: Callable[[], Item] | None = None, capacity: int = 4) -> Pool[Item]:
    return Pool("host", make or Maker(), SIZE, capacity * SIZE + SIZE - 1)


def metric(event: str) -> float:
    return REGISTRY.get_sample_value("he_pool_elements_total", {"side": "host", "event": event}) or 0.0


def level() -> float:
    return REGISTRY.get_sample_value("he_pool_level", {"side": "host"}) or 0.0


class PoolMachine(RuleBasedStateMachine):
    """Against a plain list: what was put comes out once, in order; nothing comes out that was wiped."""

    def __init__(self) -> None:
        super().__init__()
        self.make = Maker()
        self.pool = make_pool(self.make)
        self.expected: list[int] = []
        self.given: list[int] = []
        self.closed = False
        self.level = level()

    @rule()
    def fill(self) -> None:
        room = not self.closed and len(self.expected) < self.pool.capacity
        assert self.pool.fill() is room
        if room:
            self.expected.append(len(self.make.made) - 1)

    @rule(wanted=st.integers(0, 6))
    def take(self, wanted: int) -> None:
        taken = self.pool.take(wanted)
        assert [item.number for item in taken] == self.expected[:wanted]
        assert not any(item.wiped for item in taken)
        del self.expected[:wanted]
        self.given += [item.number for item in taken]

    @precondition(lambda self: not self.closed)
    @rule()
    def close(self) -> None:
        left = [item for item in self.make.made if item.number in self.expected]
        self.pool.close()
        self.closed = True
        self.expected.clear()
        assert all(item.wiped for item in left)

    @invariant()
    def holds_what_is_left(self) -> None:
        assert len(self.pool) == len(self.expected) <= 4
        assert self.pool.nbytes == SIZE * len(self.pool)
        assert len(set(self.given)) == len(self.given)
        assert level() - self.level == len(self.pool)

    def teardown(self) -> None:
        self.pool.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_metrics() -> None:
    before = {event: metric(event) for event in ("made", "taken", "in_line", "wiped")}
    pool = make_pool()
    while pool.fill():
        pass
    pool.take(3)
    pool.take(3)
    pool.fill()
    pool.close()
    pool.take(2)
    changes = {event: metric(event) - amount for event, amount in before.items()}
    assert changes == {"made": 5, "taken": 4, "in_line": 4, "wiped": 1}


def test_sizes() -> None:
    assert not Pool("host", Maker(), SIZE, SIZE - 1).fill(), "a pool without room makes nothing"
    for element_bytes, max_bytes in ((0, 10), (10, -1)):
        with pytest.raises(InvalidInputError):
            Pool("host", Maker(), element_bytes, max_bytes)


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads lose the interpreter after every few instructions, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
def test_no_element_is_given_out_twice_under_concurrency() -> None:
    """Six threads take while two fill; every element goes to one of them, once, and each sees them in order."""
    make, stop = Maker(), threading.Event()
    pool = make_pool(make, capacity=32)

    def fill() -> None:
        while not stop.is_set():
            pool.fill()

    def take() -> list[int]:
        taken: list[int] = []
        while len(taken) < 500:
            taken += [item.number for item in pool.take(1 + len(taken) % 5)]
        return taken

    with ThreadPoolExecutor(8) as threads:
        fillers = [threads.submit(fill) for _ in range(2)]
        takers = [threads.submit(take) for _ in range(6)]
        try:
            lists = [taker.result(60) for taker in takers]
        finally:
            stop.set()
        for filler in fillers:
            filler.result(60)
    given = [number for taken in lists for number in taken]
    left = [item.number for item in pool.take(32)]
    assert len(set(given + left)) == len(given + left) == len(make.made)
    assert all(taken == sorted(taken) for taken in lists), "elements come in the order they were made"
    pool.close()


def test_the_pool_keeps_no_reference() -> None:
    pool = Pool("host", lambda: Item(0), SIZE, SIZE)
    pool.fill()
    taken = weakref.ref(pool.take(1)[0])
    gc.collect()
    assert taken() is None


def test_an_element_that_is_made_while_the_pool_closes_is_wiped() -> None:
    go, made = threading.Event(), Item(0)

    def slow() -> Item:
        assert go.wait(30)
        return made

    pool = make_pool(slow)
    with ThreadPoolExecutor(1) as threads:
        filling = threads.submit(pool.fill)
        time.sleep(0.02)
        pool.close()
        go.set()
        assert filling.result(30) is False
    assert made.wiped and not pool.take(1)


def test_a_taken_element_is_the_takers() -> None:
    pool = make_pool()
    pool.fill()
    (taken,) = pool.take(1)
    pool.close()
    assert not taken.wiped


def test_it_cannot_be_copied_and_does_not_print_its_elements() -> None:
    pool = make_pool()
    pool.fill()
    with pytest.raises(TypeError):
        pickle.dumps(pool)
    assert repr(pool) == "Pool(1 of 4)"
    pool.close()


def test_a_forked_child_has_no_elements() -> None:
    """Even while another thread holds the pool's lock, which in the child nobody releases."""
    pool = make_pool()
    pool.fill()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock, pool._making:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pool.closed and not pool.take(1) and not pool.fill() else 1)
    release.set()
    holder.join()
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert len(pool.take(1)) == 1, "the parent keeps its own"
    pool.close()


class Use:
    """Tells the filler what a test says of the processors."""

    def __init__(self, idle: bool = True) -> None:
        self.now_idle = idle
        self.looks = 0

    def idle(self) -> bool:
        self.looks += 1
        return self.now_idle


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_filling_in_idle_time_within_the_common_bound() -> None:
    filler = Filler(5 * SIZE, quiet_seconds=0.01, use=Use())
    pools = [make_pool() for _ in range(2)]
    try:
        filler.add(pools[0])
        wait_for(lambda: len(pools[0]) == 4)
        filler.add(pools[1])
        wait_for(lambda: len(pools[1]) == 1)
        time.sleep(0.05)
        assert [len(pool) for pool in pools] == [4, 1]
        pools[0].close()
        wait_for(lambda: len(pools[1]) == 4)
    finally:
        filler.close()
    pools[1].take(4)
    time.sleep(0.05)
    assert len(pools[1]) == 0, "nothing is filled after close"


def test_no_filling_while_the_processors_are_busy() -> None:
    use = Use(idle=False)
    filler = Filler(100, quiet_seconds=0.005, use=use)
    pool = make_pool()
    try:
        filler.add(pool)
        wait_for(lambda: use.looks > 5)
        assert len(pool) == 0
        use.now_idle = True
        wait_for(lambda: len(pool) == 4)
    finally:
        filler.close()


def test_no_filling_while_any_pool_is_in_use() -> None:
    """A call that begins ends the filling of every pool, full or empty, after the element that is being made."""
    filler, other, make = Filler(100 * SIZE, quiet_seconds=3600.0, use=Use()), make_pool(capacity=0), Maker()

    def called_meanwhile() -> Item:
        if len(make.made) == 2:
            other.take(1)
        return make()

    pool = make_pool(called_meanwhile, capacity=50)
    filler._pools.update((pool, other))
    assert not filler._fill_for(30.0)
    assert len(pool) == len(make.made) == 3
    assert not filler._fill_for(30.0)
    assert len(pool) == 3, "nothing was taken just now, but not long ago either"


@pytest.mark.parametrize("error", [UnavailableError("gone"), ZeroDivisionError()])
def test_a_pool_that_cannot_be_filled_does_not_stop_the_others(error: Exception) -> None:
    def fail() -> Item:
        raise error

    filler = Filler(1000, quiet_seconds=0.005, use=Use())
    broken, good = make_pool(fail), make_pool()
    try:
        filler.add(broken)
        filler.add(good)
        wait_for(lambda: len(good) == 4)
        wait_for(lambda: broken not in filler._pools)
    finally:
        filler.close()


def test_pools_that_nobody_else_holds_go() -> None:
    filler = Filler(0, quiet_seconds=0.005, use=Use())
    pool = make_pool()
    filler.add(pool)
    gone = weakref.ref(pool)
    del pool
    wait_for(lambda: gc.collect() >= 0 and gone() is None)
    filler.close()


def stat(*processors: tuple[int, int]) -> str:
    """/proc/stat of processors with (busy, idle) ticks."""
    lines = [f"cpu{number} {busy} 0 0 {idle} 0 0 0 0 0 0" for number, (busy, idle) in enumerate(processors)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1 2 3"])


def test_processor_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    own = 5.0
    monkeypatch.setattr(time, "thread_time", lambda: own)
    file, tick = tmp_path / "stat", 1 / os.sysconf("SC_CLK_TCK")
    file.write_text(stat((100, 0), (0, 0), (100, 0)))
    use = ProcessorUse(file)
    file.write_text(stat((160, 40), (900, 0), (120, 80)))  # of 200 ticks 80 busy; the processor between is not ours
    own += 50 * tick
    assert use.others() == pytest.approx(30 / 200)
    assert use.others() == 1.0, "no time passed: nothing is known"
    file.write_text(stat((210, 90), (0, 0), (120, 180)))  # 50 of 200 more, none of it ours
    assert use.idle()
    file.write_text(stat((261, 139), (0, 0), (120, 280)))
    assert not use.idle()


def test_this_machine_tells_what_others_use() -> None:
    use = ProcessorUse()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pass

    worker = threading.Thread(target=work)
    worker.start()
    try:
        time.sleep(0.3)
        assert use.others() > 0.5 / len(os.sched_getaffinity(0))
    finally:
        stop.set()
        worker.join()
    start = time.thread_time()
    use.others()
    while time.thread_time() - start < 0.2:  # our own work does not count
        pass
    assert use.others() <= 1.0


@pytest.mark.parametrize("text", [None, "cpu0 1 2", "cpu0 a b c d e f g h"])
def test_unreadable_accounts_are_refused(tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    file = tmp_path / "stat"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match="pool_bytes = 0"):
        ProcessorUse(file)
