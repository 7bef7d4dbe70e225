"""What every command that starts services does first."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import structlog


def prepare_command() -> None:
    """Make SIGTERM leave context managers, as Ctrl-C does, and keep log lines out of standard output."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
