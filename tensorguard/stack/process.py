"""One child process in a process group of its own, with a log file, watched by the guardian."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.stack import guardian

_TAIL_BYTES = 16 << 10
_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How one service is started and asked for its health.

    `address` is host:port of the service. Health is asked for there, or at `health_address` where the service's own
    wants certificates: by gRPC's protocol, or by HTTP GET where `health_path` is set.
    `environment` is added to the launcher's.
    """

    name: str
    command: tuple[str, ...]
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    health_path: str = ""
    health_address: str = ""
    start_seconds: float = 120.0
    stop_seconds: float = 15.0


class Guardian:
    """Handle on the guardian process; see `tensorguard.stack.guardian`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        with contextlib.suppress(OSError):
            self._tell(f"-{group}\n")

    def close(self) -> None:
        """Let it go; groups that are still watched are ended."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(guardian.GRACE_SECONDS + 5)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()


class ManagedProcess:
    """A started service."""

    def __init__(self, spec: ServiceSpec, log_file: Path, guard: Guardian) -> None:
        """Start it. Raises ConfigurationError when the program cannot be run."""
        self.spec = spec
        self.log_file = log_file
        self._guard = guard
        with _fresh_log(log_file) as log:
            try:
                self._process = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment},
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigurationError(
                    f"cannot start the {spec.name} service: {spec.command[0]}: {error.strerror}"
                ) from error
        self.started_at = time.monotonic()
        guard.watch(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def check_alive(self, doing: str = "running") -> None:
        """Raise UnavailableError with the last lines of its log if it ended."""
        code = self.exit_code
        if code is None:
            return
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        raise UnavailableError(
            f"the {self.spec.name} service ended while {doing} ({how}). "
            f"Last lines of {self.log_file}:\n{self.log_tail()}"
        )

    def log_tail(self) -> str:
        """The last lines of its log, indented."""
        with contextlib.suppress(OSError), self.log_file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
            return "\n".join(f"    {line[:500]}" for line in lines) or "    (empty)"
        return "    (no log)"

    def terminate(self) -> None:
        """Ask it to stop; it stops its own children."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def wait_stopped(self, seconds: float) -> None:
        """Wait for it, then kill whatever is left in its process group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._guard.forget(self._process.pid)


def _fresh_log(path: Path) -> IO[bytes]:
    """Open a new log, keeping the previous run's as NAME.1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".1"))
    return path.open("wb")
