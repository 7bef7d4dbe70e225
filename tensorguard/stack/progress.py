"""Shows on standard error how the start of each service goes: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

_STILL_SECONDS = 10.0
_STYLES = {"healthy": "green", "failed": "red", "starting": "yellow", "waiting": "dim"}


class Progress(Protocol):
    """What the launcher reports to."""

    def update(self, service: str, state: str, detail: str = "") -> None: ...


class Silent:
    """Reports nowhere."""

    def update(self, service: str, state: str, detail: str = "") -> None:
        pass


class ConsoleProgress:
    """State and elapsed seconds per service. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._rows: dict[str, tuple[str, str, float, float]] = {}  # state, detail, begun, shown
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=4)
        self._interactive = self._console.is_terminal

    def __enter__(self) -> ConsoleProgress:
        if self._interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._interactive:
            self._live.stop()

    def update(self, service: str, state: str, detail: str = "") -> None:
        now = time.monotonic()
        old_state, _, begun, shown = self._rows.get(service, ("", "", now, 0.0))
        if old_state in ("", "waiting"):
            begun = now
        quiet = state == old_state and now - shown < _STILL_SECONDS
        self._rows[service] = (state, detail, begun, shown if quiet else now)
        if not self._interactive and not quiet and state != "waiting":
            text = f"{service:<10} {state:<9} {now - begun:5.1f} s  {detail}".rstrip()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for service, (state, detail, begun, shown) in self._rows.items():
            end = time.monotonic() if state == "starting" else shown
            elapsed = "" if state == "waiting" else f"{max(0.0, end - begun):5.1f} s"
            table.add_row(service, f"[{_STYLES.get(state, '')}]{state}[/]", elapsed, detail)
        return table
