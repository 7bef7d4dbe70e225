"""SIGTERM ends a process in order, unless the process has its own idea; a child ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tensorguard.backends.vllm.lifetime import end_as_before, end_in_order


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_default_is_replaced_and_restored() -> None:
    end_in_order()
    assert callable(signal.getsignal(signal.SIGTERM))
    end_in_order()
    end_as_before()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *_: None])
def test_a_handler_of_the_callers_stays(own: object) -> None:
    signal.signal(signal.SIGTERM, own)  # type: ignore[arg-type]
    end_in_order()
    assert signal.getsignal(signal.SIGTERM) is own
    end_as_before()
    assert signal.getsignal(signal.SIGTERM) is own


def test_a_handler_that_was_set_later_stays() -> None:
    def own(*_: object) -> None: ...

    end_in_order()
    signal.signal(signal.SIGTERM, own)
    end_as_before()
    assert signal.getsignal(signal.SIGTERM) is own


def test_other_threads_change_nothing() -> None:
    thread = threading.Thread(target=end_in_order)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


SCRIPT = """
import asyncio, atexit, os, signal
from tensorguard.backends.vllm.lifetime import end_in_order
atexit.register(print, "exit handler", flush=True)
async def main():
    end_in_order()
    try:
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.sleep(30)
    finally:
        print("left", flush=True)
asyncio.run(main())
"""


def test_an_event_loop_is_left_as_with_ctrl_c() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "left\nexit handler\n"), done.stderr


PARENT = """
import multiprocessing, os, time
from tensorguard.backends.vllm.lifetime import end_with_parent
def child():
    print(os.getpid(), flush=True)
    time.sleep({delay})
    end_with_parent(interval=0.05)
    print("watching", flush=True)
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=child).start()
"""


@pytest.mark.parametrize("delay", [0.0, 1.0], ids=["watching", "not watching yet"])
def test_a_child_ends_with_a_parent_that_was_killed(delay: float) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT.format(delay=delay)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        deadline = time.monotonic() + 20
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


SLOW_TO_TAKE_APART = """
import atexit, multiprocessing, sys
from tensorguard.backends.vllm.lifetime import end_at_once
def child(at_once):
    atexit.register(print, "taken apart", flush=True)
    print("done")
    if at_once:
        end_at_once()
if __name__ == "__main__":
    end_at_once()  # does nothing: nobody started this process with multiprocessing
    for at_once in (True, False):
        process = multiprocessing.get_context("spawn").Process(target=child, args=(at_once,))
        process.start()
        process.join()
        print("exit code", process.exitcode, flush=True)
    sys.exit(7)
"""


def test_a_process_that_is_done_is_not_taken_apart(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SLOW_TO_TAKE_APART)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "done\nexit code 0\ndone\ntaken apart\nexit code 0\n"


def test_ctrl_c_is_for_the_parent() -> None:
    script = PARENT.format(delay=0.0)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == b"watching\n"
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.status() == psutil.STATUS_SLEEPING
        os.killpg(process.pid, signal.SIGKILL)
