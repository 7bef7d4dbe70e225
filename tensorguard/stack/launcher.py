"""The launcher: starts services in order, waits for their health, watches them, stops them all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tensorguard.errors import UnavailableError
from tensorguard.stack.health import HealthProbe
from tensorguard.stack.process import Guardian, ManagedProcess, ServiceSpec
from tensorguard.stack.progress import Progress, Silent

_POLL_SECONDS = 0.25


class Launcher:
    """Running services. A context manager: leaving it, by whatever way, stops everything it started."""

    def __init__(self, log_dir: Path, progress: Progress | None = None) -> None:
        self._log_dir = log_dir
        self._progress: Progress = progress or Silent()
        self._guard = Guardian()
        self._processes: list[ManagedProcess] = []

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def processes(self) -> Sequence[ManagedProcess]:
        return tuple(self._processes)

    def start(self, *specs: ServiceSpec) -> None:
        """Start `specs` together and return when all are healthy.

        Raises UnavailableError when one ends or is not healthy in time (the message has the end of its log),
        and ConfigurationError when one cannot be run. The caller's context manager then stops the others.
        """
        waiting: dict[str, tuple[ManagedProcess, HealthProbe]] = {}
        with contextlib.ExitStack() as stack:
            for spec in specs:
                process = ManagedProcess(spec, self._log_dir / f"{spec.name}.log", self._guard)
                self._processes.append(process)
                waiting[spec.name] = process, stack.enter_context(HealthProbe(spec))
                self._progress.update(spec.name, "starting", spec.address)
            while waiting:
                self.check_alive("starting")
                for name, (process, probe) in list(waiting.items()):
                    if probe.healthy():
                        # Another program could answer on this port; the child must be there as well.
                        process.check_alive("starting")
                        self._progress.update(name, "healthy", process.spec.address)
                        del waiting[name]
                    elif time.monotonic() - process.started_at > process.spec.start_seconds:
                        self._progress.update(name, "failed")
                        raise UnavailableError(
                            f"the {name} service was not healthy after {process.spec.start_seconds:g} s. "
                            f"Last lines of {process.log_file}:\n{process.log_tail()}"
                        )
                    else:
                        self._progress.update(name, "starting", process.spec.address)
                time.sleep(_POLL_SECONDS)

    def check_alive(self, doing: str = "running") -> None:
        """Raise UnavailableError if any service ended."""
        for process in self._processes:
            if process.exit_code is not None:
                self._progress.update(process.spec.name, "failed")
                process.check_alive(doing)

    def wait(self) -> None:
        """Return never; raise UnavailableError when a service ends."""
        while True:
            self.check_alive()
            time.sleep(0.5)

    def stop(self, *names: str) -> None:
        """Stop the named services, the last started first, and wait until they and their children are gone.

        Without names: all of them, after which nothing can be started any more.
        """
        for process in reversed(self._processes):
            if not names or process.spec.name in names:
                process.terminate()
                process.wait_stopped(process.spec.stop_seconds)
        self._processes = [p for p in self._processes if names and p.spec.name not in names]
        if not names:
            self._guard.close()
