"""From the spans of benchmarks/step_trace.py to where a step's time goes: table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timeline import Span

PARTS = ("gather", "encrypt", "send", "base product", "link", "evaluate", "decrypt", "add", "rest of the model")
"""Of a step, in the engine's thread. Waiting is "evaluate" while the coprocessor works on a request, else "link"."""
COLOURS = {
    "gather": "#c7c7c7",
    "encrypt": "#d62728",
    "send": "#ff9896",
    "base product": "#1f77b4",
    "link": "#e7cb94",
    "evaluate": "#ff7f0e",
    "decrypt": "#9467bd",
    "add": "#8c564b",
    "rest of the model": "#aec7e8",
    "receive": "#bcbd22",
    "coprocessor at work": "#ffdcb5",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: the spans in it, by where they were."""

    whole: Span
    engine: tuple[Span, ...]
    """Of the engine's thread, only those in hooks that have a request under way."""
    replies: tuple[Span, ...]
    coprocessor: tuple[Span, ...]

    def parts(self) -> dict[str, float]:
        """Milliseconds of each of PARTS; their sum is the step."""
        alone = exclusive(self.engine)
        answers = [span for span in self.coprocessor if span.name == "answer"]
        waits = [span for span in self.engine if span.name == "wait"]
        evaluated = overlap(waits, answers)
        parts = {
            "gather": alone.get("hook", 0.0) + alone.get("begin", 0.0),
            "link": alone.get("wait", 0.0) - evaluated,
            "evaluate": evaluated,
            **{name: alone.get(name, 0.0) for name in ("encrypt", "send", "base product", "decrypt", "add")},
        }
        parts["rest of the model"] = self.whole.milliseconds - sum(parts.values())
        return {name: parts[name] for name in PARTS}

    @property
    def coprocessor_ms(self) -> float:
        """How long the coprocessor worked."""
        return sum(span.milliseconds for span in self.coprocessor if span.name == "answer")

    @property
    def hidden_ms(self) -> float:
        """How much of that the engine's thread did something else than wait."""
        answers = [span for span in self.coprocessor if span.name == "answer"]
        return self.coprocessor_ms - overlap([span for span in self.engine if span.name == "wait"], answers)


def steps(host: Sequence[Span], coprocessor: Sequence[Span], requests: int, rows: int) -> list[Step]:
    """The recorded steps of this shape, by duration."""
    found = [_step(whole, host, coprocessor) for whole in host if whole.name == f"step {requests} {rows}" and whole.end]
    return sorted(found, key=lambda step: step.whole.milliseconds)


def _step(whole: Span, host: Sequence[Span], coprocessor: Sequence[Span]) -> Step:
    inside = [span for span in host if whole.start <= span.start and span.end <= whole.end and span != whole]
    own = sorted((s for s in inside if s.thread == whole.thread), key=lambda s: (s.start, -s.end))
    hooks = [hook for hook in own if hook.name == "hook"]
    begun = [hook for hook in hooks if any(s.name == "begin" and _within(s, hook) for s in own)]
    return Step(
        whole=whole,
        engine=tuple(span for span in own if any(_within(span, hook) for hook in begun)),
        replies=tuple(span for span in inside if span.thread != whole.thread),
        coprocessor=tuple(s for s in coprocessor if whole.start <= s.start and s.end <= whole.end),
    )


def _within(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def exclusive(spans: Iterable[Span]) -> dict[str, float]:
    """Milliseconds by name in spans of one thread, without what is inside other spans in them."""
    times: dict[str, float] = {}
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while open_spans and open_spans[-1].end <= span.start:
            open_spans.pop()
        times[span.name] = times.get(span.name, 0.0) + span.milliseconds
        if open_spans:
            times[open_spans[-1].name] -= span.milliseconds
        open_spans.append(span)
    return times


def overlap(these: Iterable[Span], those: Iterable[Span]) -> float:
    """Milliseconds that are in spans of both. Spans of one kind do not overlap each other."""
    ours, others = (sorted(spans, key=lambda span: span.start) for spans in (these, those))
    total = first = second = 0
    while first < len(ours) and second < len(others):
        a, b = ours[first], others[second]
        total += max(0, min(a.end, b.end) - max(a.start, b.start))
        first, second = (first + 1, second) if a.end < b.end else (first, second + 1)
    return total / 1e6


def table(cases: dict[str, Sequence[Step]]) -> str:
    """Medians over the steps of each case, in milliseconds and as shares of the step."""
    columns = {name: _medians(found) for name, found in cases.items()}
    lines = [f"{'':<26}" + "".join(f"{name:>22}" for name in cases)]
    for part in ("whole step", *PARTS, "coprocessor at work", "of that hidden"):
        cells = (f"{values[part]:>12.1f} ms{values[part] / values['whole step']:>6.0%} " for values in columns.values())
        lines.append(f"{part:<26}" + "".join(cells))
    lines.append(f"{'steps recorded':<26}" + "".join(f"{len(found):>22}" for found in cases.values()))
    return "\n".join(lines)


def _medians(found: Sequence[Step]) -> dict[str, float]:
    rows = [
        {
            "whole step": step.whole.milliseconds,
            **step.parts(),
            "coprocessor at work": step.coprocessor_ms,
            "of that hidden": step.hidden_ms,
        }
        for step in found
    ]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def draw(cases: dict[str, Sequence[Step]], machine: str, path: Path, layers: int) -> None:
    """For each case one layer in the middle of a median step as a timeline; below, the shares of all cases."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(cases) + 1, 1, figsize=(12, 2 * len(cases) + 2.4), layout="constrained")
    for axis, (name, found) in zip(axes, cases.items(), strict=False):
        _timeline(axis, found[len(found) // 2], name, layers)
    _shares(axes[-1], {name: _medians(found) for name, found in cases.items()})
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=110)


def _timeline(axis: Any, step: Step, name: str, layers: int) -> None:
    starts = [*(span.start for span in step.engine if span.name == "hook"), step.whole.end]
    per_layer = (len(starts) - 1) // layers
    first = layers // 2 * per_layer
    begin, end = starts[first], starts[first + per_layer]

    def bar(row: int, span: Span, colour: str) -> None:
        left, right = max(span.start, begin), min(span.end, end)
        if left < right:
            axis.broken_barh([((left - begin) / 1e6, (right - left) / 1e6)], (row + 0.1, 0.8), color=COLOURS[colour])

    bar(2, step.whole, "rest of the model")
    for span in step.engine:
        bar(2, span, {"hook": "gather", "begin": "gather", "wait": "link"}.get(span.name, span.name))
        for answer in (s for s in step.coprocessor if span.name == "wait" and s.name == "answer"):
            bar(2, span._replace(start=max(span.start, answer.start), end=min(span.end, answer.end)), "evaluate")
    for span in step.replies:
        bar(1, span, span.name if span.name in COLOURS else "receive")
    for span in sorted(step.coprocessor):  # "answer" before the "evaluate" in it
        bar(0, span, "coprocessor at work" if span.name == "answer" else span.name)
    axis.set_yticks([0.5, 1.5, 2.5], ["coprocessor", "replies", "engine"], fontsize=8)
    axis.set_xlim(0, (end - begin) / 1e6)
    axis.set_title(f"{name}: one layer of a step, milliseconds", fontsize=9, loc="left")


def _shares(axis: Any, columns: dict[str, dict[str, float]]) -> None:
    for row, values in enumerate(columns.values()):
        left = 0.0
        for part in PARTS:
            share = values[part] / values["whole step"]
            axis.barh(row, share, left=left, color=COLOURS[part])
            left += share
    axis.set_yticks(range(len(columns)), list(columns), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_title("shares of a step, in the engine's thread (medians)", fontsize=9, loc="left")
