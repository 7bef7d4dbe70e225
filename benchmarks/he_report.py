"""What `benchmarks/he_core.py` found, as a table and as a picture."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS, OUR_OPENFHE = "tensafe-cpu", "tensafe-openfhe"
ROTATING = ("openfhe-rotate-and-sum", "openfhe-bsgs", "openfhe-bsgs-n4096", "tenseal-mm")
COEFFICIENTS = "openfhe-coefficients"
COLOURS = {
    "tensafe-cpu": "#0b6e4f",
    "tensafe-cpu (pools)": "#5cb85c",
    "tensafe-openfhe": "#8fbc3b",
    "openfhe-rotate-and-sum": "#c0392b",
    "openfhe-bsgs": "#e67e22",
    "openfhe-bsgs-n4096": "#f1a340",
    "openfhe-columns": "#7d3c98",
    "openfhe-coefficients": "#2471a3",
    "tenseal-mm": "#555555",
}
Record = dict[str, Any]


@dataclass
class Report:
    """Everything that the JSON file holds."""

    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Engines that cannot run here, with the reason."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Cases that an engine did not run, with the reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def find(self, engine: str, d: int, rows: int, tokens: int) -> Record | None:
        shape = (engine, d, rows, tokens)
        return next((r for r in self.records if (r["engine"], r["d"], r["rows"], r["tokens"]) == shape), None)

    @property
    def engines(self) -> list[str]:
        return list(dict.fromkeys(record["engine"] for record in self.records))

    def shape(self) -> tuple[int, int]:
        """(d, rows) of the headline: 4096 and 48 where they were measured."""
        ds, rows = ({record[name] for record in self.records} for name in ("d", "rows"))
        return max((d for d in ds if d <= 4096), default=min(ds)), max(rows)


def machine(root: Path, core: int) -> dict[str, Any]:
    """Where and when, and at which commit."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "cpu": next(models, platform.processor() or "unknown"),
        "processors": os.cpu_count(),
        "core": core,
        "threads": 1,
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "load": round(os.getloadavg()[0], 2),
    }


def text(report: Report) -> str:
    """The tables, as plain text."""
    facts = report.machine
    lines = [
        f"{facts['cpu']}, {facts['processors']} processors, one thread on core {facts['core']}, {facts['system']}",
        f"{facts['date']}, commit {facts['commit']}, load average at the start {facts['load']}",
        *(f"{engine}: {_joined(versions)}" for engine, versions in report.versions.items()),
        *(f"{engine}: NOT RUN: {reason}" for engine, reason in report.unavailable.items()),
        "",
        "z = A·x. Milliseconds of CPU time, medians. Private: a response tells no more than z. Keys: all that the",
        "evaluating side needs before the first product. Error: of all z, relative, against float64.",
    ]
    shapes = dict.fromkeys((r["d"], r["rows"], r["tokens"]) for r in report.records)
    for d, rows, tokens in shapes:
        lines += ["", f"d = {d}, {rows} rows, {tokens} token{'s' * (tokens > 1)}"]
        lines.append(
            f"  {'engine':<24}{'encrypt':>11}{'evaluate':>11}{'decrypt':>11}{'up':>11}{'down':>11}{'keys':>11}"
            f"{'error':>10}  private  runs"
        )
        for r in report.records:
            if (r["d"], r["rows"], r["tokens"]) == (d, rows, tokens):
                times = "".join(f"{_ms(r[f'{step}_ms']):>11}" for step in ("encrypt", "evaluate", "decrypt"))
                sizes = "".join(f"{_size(r[key]):>11}" for key in ("bytes_up", "bytes_down", "key_bytes"))
                private = "yes" if r["function_private"] else "no"
                lines.append(f"  {r['engine']:<24}{times}{sizes}{r['rel_error']:>10.1e}  {private:<7}{r['repeats']:>6}")
        for s in report.skipped:
            if (s["d"], s["rows"], s["tokens"]) == (d, rows, tokens):
                lines.append(f"  {s['engine']:<24}not run: {s['reason']}")
    if report.records:
        lines += ["", *_ratios(report), "", *_notes(report)]
    return "\n".join(lines)


def _joined(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def _ratios(report: Report) -> list[str]:
    """TenSafe's time as a part of the peers', and where they are ahead."""
    d, rows = report.shape()
    ours = report.find(OURS, d, rows, 1)
    if ours is None:
        return ["no ratios: no TenSafe record for one token"]
    lines = [f"Ratios at d = {d}, {rows} rows, 1 token (below 1: TenSafe takes less)"]

    def compare(what: str, other: Record | None, peer: str, keys: tuple[str, ...], goal: float | None) -> None:
        if other is None:
            lines.append(f"  {what + ' / ' + peer:<66} not measured")
            return
        mine, theirs = (sum(record[key] for key in keys) for record in (ours, other))
        verdict = "" if goal is None else f"   goal {goal:g}: {'met' if mine <= goal * theirs else 'MISSED'}"
        value = f"{mine / theirs:.3f}" if theirs else "-"
        lines.append(f"  {what + ' / ' + peer:<66}{value:>7}{verdict}")

    evaluate, host = ("evaluate_ms",), ("encrypt_ms", "decrypt_ms")
    rotating = [r for engine in ROTATING if (r := report.find(engine, d, rows, 1))]
    best = min(rotating, key=lambda r: float(r["evaluate_ms"]), default=None)
    compare(
        "evaluate", best, f"best with rotations ({best['engine'] if best else 'none ran'})", ("evaluate_ms",), 1 / 20
    )
    for record in rotating:
        if record is not best:
            compare("evaluate", record, record["engine"], evaluate, None)
    compare("evaluate", report.find(OUR_OPENFHE, d, rows, 1), OUR_OPENFHE, evaluate, 1 / 2)
    coefficients = report.find(COEFFICIENTS, d, rows, 1)
    compare("evaluate", coefficients, f"{COEFFICIENTS} (not private)", evaluate, None)
    compare("encrypt + decrypt", coefficients, COEFFICIENTS, host, 1 / 4)
    if best is not None:
        compare("encrypt + decrypt", best, best["engine"], host, None)
    lines += ["", "Where a peer is ahead of tensafe-cpu (every shape, every figure)"]
    ahead = _ahead(report)
    return lines + (ahead or ["  nowhere"])


def _ahead(report: Report) -> list[str]:
    figures = {
        "encrypt": ("encrypt_ms",),
        "evaluate": ("evaluate_ms",),
        "decrypt": ("decrypt_ms",),
        "bytes up": ("bytes_up",),
        "bytes down": ("bytes_down",),
        "keys": ("key_bytes",),
        "error": ("rel_error",),
    }
    lines = []
    for engine in report.engines:
        if engine.startswith(OURS):
            continue
        for name, (key,) in figures.items():
            factors = [
                ours[key] / max(r[key], 1e-300)
                for r in report.records
                if r["engine"] == engine
                and (ours := report.find(OURS, r["d"], r["rows"], r["tokens"]))
                and r[key] < ours[key]
            ]
            if not factors:
                continue
            count = sum(1 for r in report.records if r["engine"] == engine)
            most = "needs none" if key == "key_bytes" and max(factors) > 1e12 else f"by up to {max(factors):.1f}x"
            lines.append(f"  {engine:<24}{name:<12}in {len(factors)} of {count} shapes, {most}")
    return lines


def _notes(report: Report) -> list[str]:
    notes: dict[str, str] = {}
    for record in report.records:
        notes.setdefault(record["engine"], record["note"])
    return ["Notes (of each engine's first shape)", *(f"  {engine}: {note}" for engine, note in notes.items())]


def draw(report: Report, path: Path) -> None:
    """Evaluation over d, time per token over the batch, and bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.35, "grid.linewidth": 0.6})
    d, rows = report.shape()
    figure, (over_d, over_tokens, sizes) = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained")
    figure.patch.set_facecolor("white")
    for engine in report.engines:
        style: dict[str, Any] = {"color": COLOURS[engine], "marker": "o", "label": engine, "linewidth": 1.6}
        if engine.startswith("tensafe"):
            style["linewidth"] = 2.8
        own = [r for r in report.records if r["engine"] == engine and r["rows"] == rows]
        single = sorted((r["d"], r["evaluate_ms"]) for r in own if r["tokens"] == 1)
        if single:
            over_d.plot(*zip(*single, strict=True), **style)
        batch = sorted((r["tokens"], _total(r) / r["tokens"]) for r in own if r["d"] == d)
        if batch:
            over_tokens.plot(*zip(*batch, strict=True), **style)
    for axes, name, ticks in (
        (over_d, "input channels d", sorted({r["d"] for r in report.records})),
        (over_tokens, "tokens in one product", sorted({r["tokens"] for r in report.records})),
    ):
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    over_d.set(title=f"Evaluation of one product, {rows} rows, 1 token", ylabel="milliseconds, one core (log scale)")
    over_tokens.set(
        title=f"Encrypt + evaluate + decrypt per token, d = {d}, {rows} rows",
        ylabel="milliseconds, one core (log scale)",
    )
    figure.legend(*over_d.get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=9)
    _draw_sizes(sizes, [r for r in report.records if (r["d"], r["rows"], r["tokens"]) == (d, rows, 1)])
    sizes.set_title(f"Bytes, d = {d}, {rows} rows, 1 token (log scale)")
    facts = report.machine
    figure.suptitle(f"z = A·x under CKKS. {facts['cpu']}, one thread, {facts['date'][:10]}, commit {facts['commit']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _total(record: Record) -> float:
    return float(record["encrypt_ms"] + record["evaluate_ms"] + record["decrypt_ms"])


def _draw_sizes(axes: Any, records: list[Record]) -> None:
    kinds = (("bytes_up", "up", "#2471a3"), ("bytes_down", "down", "#e67e22"), ("key_bytes", "keys, once", "#999999"))
    places = range(len(records))
    for offset, (key, label, colour) in zip((-0.27, 0.0, 0.27), kinds, strict=True):
        values = [max(record[key], 1) for record in records]
        bars = axes.barh([place + offset for place in places], values, 0.25, color=colour, label=label)
        axes.bar_label(
            bars, [_size(record[key]) if record[key] else "none" for record in records], fontsize=7, padding=2
        )
    axes.set_yticks(places, [record["engine"] for record in records])
    axes.set(xscale="log", xlim=(1e3, 3e10))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, loc="lower right")
