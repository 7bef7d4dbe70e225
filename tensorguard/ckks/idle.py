"""Whether anybody else wants the processors this process may use, from the kernel's own accounts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorguard.errors import ConfigurationError

_BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)
"""user, nice, system, irq, softirq and steal of a line of /proc/stat; 4 and 5 are idle and iowait."""
_IDLE_COLUMNS = (4, 5)
_MOST_USED = 0.25


class ProcessorUse:
    """How much of the processors others used since the last look. Used by one thread, whose own time is left out.

    /proc/stat counts every process of the machine in ticks of about 10 ms, so looks should be some tens of
    milliseconds apart. It does not know a container's quota.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        """Raises ConfigurationError where the kernel keeps no such accounts."""
        self._stat = stat
        self._tick = 1.0 / os.sysconf("SC_CLK_TCK")
        self._busy, self._total = self._read()
        self._own = time.thread_time()

    def others(self) -> float:
        """Share of the processors' time, from 0 to 1, that others used since the last look; 1 if no time passed."""
        busy, total = self._read()
        own = time.thread_time()
        elapsed = total - self._total
        share = (busy - self._busy - (own - self._own)) / elapsed if elapsed > 0 else 1.0
        self._busy, self._total, self._own = busy, total, own
        return max(0.0, share)

    def idle(self) -> bool:
        """Whether others used at most a quarter of the processors since the last look."""
        return self.others() <= _MOST_USED

    def _read(self) -> tuple[float, float]:
        """(busy, busy or idle) seconds since boot, over the processors this process may use."""
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        busy = idle = 0
        try:
            for line in self._stat.read_text().splitlines():
                columns = line.split()
                if columns and columns[0] in mine:
                    busy += sum(int(columns[column]) for column in _BUSY_COLUMNS)
                    idle += sum(int(columns[column]) for column in _IDLE_COLUMNS)
        except (OSError, ValueError, IndexError):
            raise ConfigurationError(
                f"{self._stat} cannot be read, so it is not known when this machine is idle: switch pools of "
                "encryptions of zero off (pool_bytes = 0)"
            ) from None
        return busy * self._tick, (busy + idle) * self._tick
