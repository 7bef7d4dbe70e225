"""The trace's arithmetic on spans that are made up, and that what it puts clocks on is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_report import PARTS, draw, exclusive, overlap, steps, table
from benchmarks.timeline import COPROCESSOR, HOST, Recorder, Span, find

MILLISECOND = 1_000_000


def span(name: str, start: float, end: float, thread: str = "main") -> Span:
    return Span(name, thread, int(start * MILLISECOND), int(end * MILLISECOND))


def one_step(at: float = 0.0) -> tuple[list[Span], list[Span]]:
    """A step of 20 ms: a hook from 2 to 12 with everything in it, and one that had nothing to ask for."""
    host = [
        span("step 1 1", at, at + 20),
        span("hook", at + 2, at + 12),
        span("begin", at + 3, at + 6),
        span("encrypt", at + 3.5, at + 5),
        span("send", at + 5, at + 6),
        span("base product", at + 6, at + 8),
        span("wait", at + 8, at + 10),
        span("receive", at + 9.5, at + 10, "replies"),
        span("decrypt", at + 10, at + 10.5),
        span("add", at + 10.5, at + 11.5),
        span("hook", at + 14, at + 15),
        span("base product", at + 14, at + 15),
    ]
    return host, [span("answer", at + 7, at + 9, "stream"), span("evaluate", at + 7.5, at + 8.5, "stream")]


def test_the_parts_of_a_step() -> None:
    (step,) = steps(*one_step(), requests=1, rows=1)
    parts = step.parts()
    assert tuple(parts) == PARTS
    assert parts == pytest.approx(
        {
            "gather": 2.0,  # 2 to 3, 3 to 3.5 and 11.5 to 12
            "encrypt": 1.5,
            "send": 1.0,
            "base product": 2.0,  # not that of the hook without a request
            "link": 1.0,  # waited from 9 to 10 while the coprocessor had finished
            "evaluate": 1.0,  # waited from 8 to 9 for it
            "decrypt": 0.5,
            "add": 1.0,
            "rest of the model": 10.0,
        }
    )
    assert sum(parts.values()) == pytest.approx(step.whole.milliseconds)
    assert (step.coprocessor_ms, step.hidden_ms) == (2.0, 1.0)


def test_steps_are_told_apart_by_shape_and_time() -> None:
    host, coprocessor = one_step()
    later, later_coprocessor = one_step(100)
    host += [*later, span("step 8 8", 200, 230)]
    found = steps(host, coprocessor + later_coprocessor, 1, 1)
    assert [len(step.coprocessor) for step in found] == [2, 2]
    assert [step.whole.milliseconds for step in steps(host, [], 8, 8)] == [30.0]


def test_times_are_counted_once() -> None:
    assert exclusive([span("a", 0, 10), span("b", 1, 4), span("b", 2, 3), span("a", 5, 6)]) == {"a": 7.0, "b": 3.0}
    assert overlap([span("a", 0, 2), span("a", 4, 6)], [span("b", 1, 5)]) == 2.0


def test_table_and_picture(tmp_path: Path) -> None:
    cases = {"decode": steps(*one_step(), requests=1, rows=1)}
    assert "evaluate" in table(cases) and "20.0 ms" in table(cases)
    draw(cases, "a machine", tmp_path / "step.png", layers=1)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("site", [*HOST.values(), *COPROCESSOR.values()])
def test_what_is_timed_is_there(site: str) -> None:
    find(site)


def test_a_function_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        find("benchmarks.timeline:Recorder.nothing")


def test_clocks_record_while_they_are_on() -> None:
    class Product:
        def work(self, value: int) -> int:
            if value < 0:
                raise ValueError
            return 2 * value

    recorder = Recorder()
    Product.work = recorder.clock("work", Product.work)  # type: ignore[method-assign]
    product: Any = Product()
    assert product.work(1) == 2 and recorder.take() == []
    recorder.on = True
    assert product.work(2) == 4
    with pytest.raises(ValueError):
        product.work(-1)
    spans = recorder.take()
    assert [s.name for s in spans] == ["work", "work"] and all(s.start <= s.end for s in spans)
    assert recorder.take() == []
