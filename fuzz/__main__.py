"""Fuzz all targets and write a report.

    python -m fuzz [--seconds 600] [--targets frames sessions ...] [--report FILE] [--keep]

The time is divided among the targets. Exit status 1 if anything was found; the inputs are in .cache/fuzz then, and
`python -m fuzz.child TARGET FILE` shows one again. Needs atheris (`make fuzz` prepares .venv-fuzz).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fuzz.target import CORPUS

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "fuzz"
TARGETS = {
    "frames": 0.2,
    "sessions": 0.3,
    "shared_memory": 0.2,
    "manifest": 0.1,
    "tdx": 0.05,
    "snp": 0.05,
    "nitro": 0.05,
    "nvidia": 0.05,
}
"""With their shares of the time."""
LONGEST_INPUT = 512
RSS_LIMIT_MIB = 2048
KEPT_INPUTS = 150


@dataclass(frozen=True, slots=True)
class Outcome:
    """What libFuzzer says at the end of a run."""

    target: str
    seconds: float
    executions: int
    coverage: int
    features: int
    corpus: int
    peak_rss_mib: int
    findings: tuple[str, ...]
    ended: bool
    """By its time limit, as it should."""


def fuzz(target: str, seconds: int) -> Outcome:
    """Runs one target in a process of its own. Its output is kept beside the inputs."""
    folder = WORK / target
    corpus, findings = folder / "corpus", folder / "findings"
    shutil.rmtree(findings, ignore_errors=True)
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    kept = CORPUS / target
    for path in sorted(kept.iterdir()) if kept.is_dir() else []:
        shutil.copy(path, corpus)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT}",
        "-len_control=0",
        f"-rss_limit_mb={RSS_LIMIT_MIB}",
        "-timeout=60",
        "-print_final_stats=1",
        f"-artifact_prefix={findings}/",
    ]
    started = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        done = subprocess.run(
            [sys.executable, "-m", "fuzz.child", target, *options, str(corpus)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output.seek(0)
        text = output.read()
    progress = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", text)
    coverage, features, size = map(int, progress[-1]) if progress else (0, 0, 0)
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    rss = re.search(r"stat::peak_rss_mb:\s*(\d+)", text)
    causes = re.findall(r"^(?:ERROR: libFuzzer: .*|\w*(?:Error|Exception|Memory)\b.*)$", text, re.MULTILINE)
    found = tuple(f"{path.name}: {'; '.join(causes[-2:])}" for path in sorted(findings.iterdir()))
    if done.returncode and not found:
        found = (f"ended with code {done.returncode}: {'; '.join(causes[-1:]) or 'see output.txt'}",)
    return Outcome(
        target=target,
        seconds=time.monotonic() - started,
        executions=int(executed.group(1)) if executed else 0,
        coverage=coverage,
        features=features,
        corpus=size,
        peak_rss_mib=int(rss.group(1)) if rss else 0,
        findings=found,
        ended=done.returncode == 0,
    )


def report(outcomes: list[Outcome]) -> str:
    """The report as plain text."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") + " with changes" * bool(git("status", "--porcelain", "-uno"))
    versions = f"Python {platform.python_version()}, atheris {importlib.metadata.version('atheris')}"
    columns = f"{'executions':>12}{'coverage':>10}{'features':>10}{'corpus':>8}{'peak RSS':>11}  ended"
    lines = [
        f"Fuzzing, {datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}",
        f"commit {commit}, {versions}",
        "",
        f"{'target':<14}{'seconds':>9}{columns}",
    ]
    for o in outcomes:
        lines.append(
            f"{o.target:<14}{o.seconds:>9.0f}{o.executions:>12,}{o.coverage:>10}{o.features:>10}{o.corpus:>8}"
            f"{o.peak_rss_mib:>7} MiB  {'by time' if o.ended else 'EARLY'}"
        )
    findings = [f"  {o.target}: {finding}" for o in outcomes for finding in o.findings]
    lines += ["", "Findings:", *(findings or ["  none"])]
    return "\n".join(lines)


def keep_corpus(target: str) -> None:
    """The smallest inputs that libFuzzer found worth keeping, for the next run and for the replay test."""
    found = [path for path in (WORK / target / "corpus").iterdir() if not path.name.startswith("seed-")]
    shutil.rmtree(CORPUS / target, ignore_errors=True)
    (CORPUS / target).mkdir(parents=True)
    for path in sorted(found, key=lambda path: (path.stat().st_size, path.name))[:KEPT_INPUTS]:
        shutil.copy(path, CORPUS / target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together (%(default)s)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "fuzz.txt")
    parser.add_argument("--keep", action="store_true", help="put the inputs found into fuzz/corpus")
    options = parser.parse_args()
    whole = sum(TARGETS[target] for target in options.targets)
    outcomes = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=options.seconds)
        for target in options.targets:
            seconds = max(1, round(options.seconds * TARGETS[target] / whole))
            progress.update(task, description=f"{target}, {seconds} s")
            outcomes.append(fuzz(target, seconds))
            progress.advance(task, seconds)
            if options.keep:
                keep_corpus(target)
    text = report(outcomes)
    print(text)
    options.report.write_text(text + "\n")
    if any(outcome.findings or not outcome.ended for outcome in outcomes):
        raise SystemExit(f"see the inputs and output.txt in {WORK}")


if __name__ == "__main__":
    main()
