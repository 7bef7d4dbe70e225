"""The engine's worker with clocks in it; for benchmarks/step_trace.py."""

from __future__ import annotations

import threading
import time
from typing import Any

from benchmarks.timeline import HOST, Recorder, Span
from tensorguard.backends.vllm.worker import HeLoraWorker


class TracedWorker(HeLoraWorker):
    """Records a "step REQUESTS ROWS" span for each forward pass, besides those of the clocked functions."""

    def load_model(self, **kwargs: Any) -> None:
        self.trace_recorder = Recorder()
        self.trace_recorder.install(HOST)
        super().load_model(**kwargs)

    def execute_model(self, scheduler_output: Any) -> Any:
        rows = scheduler_output.num_scheduled_tokens
        started = time.perf_counter_ns()
        output = super().execute_model(scheduler_output)
        if self.trace_recorder.on and rows:
            name = f"step {len(rows)} {sum(rows.values())}"
            thread = threading.current_thread().name
            self.trace_recorder.spans.append(Span(name, thread, started, time.perf_counter_ns()))
        return output

    def trace_start(self) -> None:
        """Record from now on."""
        self.trace_recorder.on = True

    def trace_stop(self) -> list[list[Any]]:
        """Record no longer; what was recorded."""
        self.trace_recorder.on = False
        return [list(span) for span in self.trace_recorder.take()]
