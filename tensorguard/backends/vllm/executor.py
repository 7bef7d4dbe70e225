"""How vLLM's engine process waits for its workers on a CPU.

vLLM's own executor looks again and again whether the step is done, without a pause: where engine, worker and
coprocessor share two cores, that takes most of one of them for as long as a step lasts. This one sleeps until the
worker says so, which vLLM does only after a second without steps.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class SleepingExecutor(MultiprocExecutor):
    """vLLM's executor for workers in processes of their own, but for the waiting."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for answers in self.response_mqs:
            # What the worker sends a notification for, it has written before.
            answers._spin_condition.busy_loop_s = 0.0
