"""z = A·x under CKKS: TenSafe beside OpenFHE and TenSEAL, the same products in one run, one thread.

    python benchmarks/he_core.py [--quick] [--json FILE] [--picture FILE] [--text FILE]

Every engine runs in a process of its own, pinned to one core, with the interpreter it needs: TenSafe in this one,
its openfhe backend, OpenFHE and TenSEAL in .venv-peers (scripts/setup_peers.sh; `make bench-he` does both). An engine
that cannot run here is listed with the reason. Times are medians of CPU time; TenSafe's are those of a steady state
over at least 512 tokens in which every encryption of zero is made and every seed expanded. Records have engine, d,
rows, tokens, encrypt_ms, evaluate_ms, decrypt_ms, bytes_up, bytes_down, key_bytes, rel_error, function_private, and
beyond these evaluation_key_bytes, repeats and note.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from he_peers.case import Case, to_json
from he_report import Report, draw, machine, text
from he_worker import ENGINES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tensorguard.ckks import DEFAULT_PARAMETER_SET, compile_plans, get_parameter_set, select_plan

ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Unavailable(Exception):  # noqa: N818 - an outcome, not a failure
    """The engine cannot run here. The message says why."""


class Worker:
    """An engine's process."""

    def __init__(self, engine: str, core: int, peers_python: Path) -> None:
        python = Path(sys.executable) if engine.startswith("tensafe-cpu") else peers_python
        if not python.exists():
            raise Unavailable(f"no {python}: run scripts/setup_peers.sh, which needs a Python 3.10")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [str(python), str(ROOT / "benchmarks" / "he_worker.py"), engine, str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
        )
        hello = self._read()
        if "unavailable" in hello:
            self._process.wait()
            raise Unavailable(hello["unavailable"])
        self.versions: dict[str, str] = hello["versions"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"its process ended with code {self._process.wait()}; its output is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, case: Case) -> dict[str, Any]:
        """{"record": ...} or {"skipped": reason}. Raises Unavailable when the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(to_json(case)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unavailable(f"its process ended with code {self._process.wait()}; its output is above") from None
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_cases(options: argparse.Namespace) -> Iterator[Case]:
    parameters = get_parameter_set(DEFAULT_PARAMETER_SET)
    for d, rows, tokens in itertools.product(options.d, options.rows, options.tokens):
        plan = select_plan(compile_plans(parameters, d, rows), parameters, tokens, d, rows)
        yield Case(
            d=d,
            rows=rows,
            tokens=tokens,
            plan=plan.shape,
            repeats=options.repeats,
            steady_tokens=options.steady_tokens,
            seconds=options.seconds,
            longest_seconds=options.longest_seconds,
        )


def run(engines: Sequence[str], cases: Sequence[Case], peers_python: Path) -> Report:
    """All cases on all engines, one engine after another, on the last core this process may use."""
    core = max(os.sched_getaffinity(0))
    report = Report(machine=machine(ROOT, core))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(engines) * len(cases))
        for position, engine in enumerate(engines, 1):
            progress.update(task, description=f"{engine}: starting")
            try:
                run_engine(engine, cases, Worker(engine, core, peers_python), report, progress, task)
            except Unavailable as reason:
                report.unavailable[engine] = str(reason)
            progress.update(task, completed=position * len(cases))
    return report


def run_engine(
    engine: str, cases: Sequence[Case], worker: Worker, report: Report, progress: Progress, task: Any
) -> None:
    report.versions[engine] = worker.versions
    for case in cases:
        shape = {"d": case.d, "rows": case.rows, "tokens": case.tokens}
        progress.update(task, description=f"{engine}: {case.d} channels, {case.rows} rows, {case.tokens} tokens")
        answer = worker.run(case)
        if "record" in answer:
            report.records.append(answer["record"])
        else:
            report.skipped.append({"engine": engine, **shape, "reason": answer["skipped"]})
        progress.advance(task)
    worker.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes, short: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, default=ROOT / "reports" / "he_core.json", help="records (%(default)s)")
    parser.add_argument("--picture", type=Path, help="default: the JSON file's name with .png")
    parser.add_argument("--text", type=Path, help="the table, as printed (default: the JSON file's name with .txt)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--d", type=int, nargs="+", help="input channels")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="interpreter with openfhe and tenseal")
    options = parser.parse_args()
    quick = options.quick
    options.d = options.d or ([576, 4096] if quick else [576, 2048, 4096, 8192])
    options.rows = options.rows or ([48] if quick else [16, 48])
    options.tokens = options.tokens or ([1, 8] if quick else [1, 8, 64])
    options.repeats = options.repeats or (5 if quick else 15)
    options.steady_tokens = 64 if quick else 512
    options.seconds, options.longest_seconds = (0.3, 12.0) if quick else (2.0, 60.0)
    options.picture = options.picture or options.json.with_suffix(".png")
    options.text = options.text or options.json.with_suffix(".txt")
    return options


def main() -> None:
    options = parse()
    report = run(options.engines, list(make_cases(options)), options.peers_python)
    table = text(report)
    print(table)
    options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    options.text.write_text(table + "\n")
    if report.records:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
