"""Clocks around the product's own functions, put there from outside: the product has no instrumentation.

`time.perf_counter_ns` reads CLOCK_MONOTONIC, which all processes of a Linux machine share, so spans of the engine's
worker and of the coprocessor lie on one axis. A clock costs about a microsecond a call.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HOST = {
    "hook": "tensorguard.backends.vllm.hooks:HookedLinearMethod.compute",
    "begin": "tensorguard.session.client:CoprocessorSession.begin",
    "encrypt": "tensorguard.ckks.host:HostSession.encrypt",
    "send": "tensorguard.session.stream:EvaluationStream.submit",
    "base product": "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply",
    "wait": "tensorguard.session.stream:Reply.result",
    "receive": "tensorguard.session.frames:read_response",
    "decrypt": "tensorguard.ckks.host:HostSession.decrypt",
    "add": "tensorguard.backends.vllm.hooks:add_delta",
}
"""Name of the span -> "module:function" that it times. "hook" is what all of them but "receive" lie in."""
COPROCESSOR = {
    "answer": "services.he_lora.evaluation:Evaluation.answer",
    "evaluate": "tensorguard.ckks.evaluator:Evaluator.evaluate",
}


class Span(NamedTuple):
    """One call of a clocked function: start and end in nanoseconds of CLOCK_MONOTONIC."""

    name: str
    thread: str
    start: int
    end: int

    @property
    def milliseconds(self) -> float:
        return (self.end - self.start) / 1e6


@dataclass(slots=True)
class Recorder:
    """Keeps spans while `on`. Appending to a list is atomic, so threads need no lock."""

    on: bool = False
    spans: list[Span] = field(default_factory=list)

    def clock(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a span for each call."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            started = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append(Span(name, threading.current_thread().name, started, time.perf_counter_ns()))

        return clocked

    def install(self, sites: dict[str, str]) -> None:
        """Put clocks around these functions. Raises AttributeError where one is not there any more."""
        for name, site in sites.items():
            owner, attribute = find(site)
            setattr(owner, attribute, self.clock(name, getattr(owner, attribute)))

    def take(self) -> list[Span]:
        """The spans since the last call."""
        taken, self.spans = self.spans, []
        return taken


def find(site: str) -> tuple[Any, str]:
    """What holds the function "module:name" or "module:Class.name", and the function's name in it."""
    module, _, path = site.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    if not callable(getattr(owner, attribute)):
        raise AttributeError(f"{site} is not a function")
    return owner, attribute
