"""A process that is told to stop ends in order, so that nothing it started stays behind."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import NoReturn


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as a shell reports it


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
