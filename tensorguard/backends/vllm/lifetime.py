"""Nothing stays behind: processes end in order when they are told to, and with the process that started them."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

_watching = threading.Lock()


def end_in_order() -> None:
    """Make SIGTERM leave contexts and run exit handlers, as Ctrl-C does anyway.

    Only where the process has not said otherwise: a handler of the caller's (or of its event loop) stays. Without
    effect outside the main thread, where Python has no say about signals.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)


def end_as_before() -> None:
    """Undo `end_in_order`, unless somebody else has set a handler since."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent(interval: float = 1.0) -> None:
    """Exit when the process that started this one with `multiprocessing` is gone. Calling again does nothing.

    vLLM starts its processes as daemons of the caller, which ends them when the caller exits by itself, but
    not when it is killed. Ctrl-C in a terminal reaches all of them at once, and a worker that ends by itself is a crash
    to vLLM, so it is left to the caller, which ends them in order.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not _watching.acquire(blocking=False):
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_at_once() -> None:
    """Have a process that `multiprocessing` started not take its interpreter apart once its work is done.

    With torch and vLLM in it that takes seconds, and vLLM kills a worker after five; a process that is killed leaves
    its shared memory behind. Without effect in a process that somebody else started.
    """
    if multiprocessing.parent_process() is not None:
        atexit.register(_end)


def _end() -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as a shell reports it
