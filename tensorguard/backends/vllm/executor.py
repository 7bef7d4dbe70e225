"""How vLLM's engine process waits for its workers on a CPU.

vLLM's own executor looks again and again whether the step is done, without a pause: where engine, worker and
coprocessor share two cores, that takes most of one of them for as long as a step lasts. This one sleeps until the
worker says so, which vLLM does only after a second without steps, and for a millisecond at most: vLLM's notifications
may get lost when steps are short, and it would look again after five seconds only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

LONGEST_SLEEP_MS = 1


class Poller(Protocol):
    """The part of `zmq.Poller` that vLLM waits with."""

    def poll(self, timeout: int | None = None) -> list[tuple[object, int]]:
        """The sockets that something came in on, waiting at most `timeout` milliseconds."""
        ...


@dataclass(frozen=True, slots=True)
class BriefPoller:
    """A poller that comes back soon, whatever it was told to wait for."""

    sockets: Poller

    def poll(self, timeout: int | None = None) -> list[tuple[object, int]]:
        return self.sockets.poll(LONGEST_SLEEP_MS if timeout is None else min(timeout, LONGEST_SLEEP_MS))


class SleepingExecutor(MultiprocExecutor):
    """vLLM's executor for workers in processes of their own, but for the waiting."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for answers in self.response_mqs:
            condition = answers._spin_condition
            condition.busy_loop_s = 0.0
            condition.poller = BriefPoller(condition.poller)
