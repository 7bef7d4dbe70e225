"""From the times of benchmarks/attestor.py to its records, tables and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Verification:
    """Of one kind of evidence, in one thread."""

    kind: str
    bytes_given: int
    """Evidence and endorsements."""
    count: int
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """At the median."""
        return 1e3 / self.p50_ms


@dataclass(frozen=True, slots=True)
class Requests:
    """Of one kind, from several workloads at the same time."""

    request: str
    workloads: int
    count: int
    per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(slots=True)
class Report:
    """What was measured, and on what."""

    machine: str
    synced_write_ms: float
    """Median until 4 KiB are on the disk that has the database."""
    verifications: list[Verification] = field(default_factory=list)
    requests: list[Requests] = field(default_factory=list)

    @property
    def header(self) -> str:
        """What it ran on."""
        return f"{self.machine}, 4 KiB on the disk in {self.synced_write_ms:.2f} ms"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        verifications = [{**asdict(item), "per_second": item.per_second} for item in self.verifications]
        return {**asdict(self), "verifications": verifications}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def text(report: Report) -> str:
    """The tables."""
    lines = [report.header, "", f"{'evidence':<18}{'kB':>7}{'count':>8}{'p50 ms':>9}{'p99 ms':>9}{'a second':>10}"]
    lines += [
        f"{v.kind:<18}{v.bytes_given / 1000:>7.1f}{v.count:>8}{v.p50_ms:>9.2f}{v.p99_ms:>9.2f}{v.per_second:>10.0f}"
        for v in report.verifications
    ]
    lines += ["", f"{'request':<18}{'at once':>8}{'count':>8}{'p50 ms':>9}{'p99 ms':>9}{'a second':>10}"]
    lines += [
        f"{r.request:<18}{r.workloads:>8}{r.count:>8}{r.p50_ms:>9.1f}{r.p99_ms:>9.1f}{r.per_second:>10.0f}"
        for r in report.requests
    ]
    return "\n".join(lines)


def draw(report: Report, path: Path) -> None:
    """Verifications and requests a second, and the requests' latencies."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (verifications, rates, latencies) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    bars = verifications.bar([v.kind for v in report.verifications], [v.per_second for v in report.verifications], 0.5)
    verifications.bar_label(bars, fmt="%.0f", fontsize=8)
    verifications.set_ylabel("verifications a second, one thread")
    verifications.tick_params(axis="x", labelsize=8)
    names = list(dict.fromkeys(r.request for r in report.requests))
    counts = sorted({r.workloads for r in report.requests})
    for position, count in enumerate(counts):
        chosen = {r.request: r for r in report.requests if r.workloads == count}
        places = [index + 0.8 / len(counts) * position for index in range(len(names))]
        width, label = 0.7 / len(counts), f"{count} at once"
        rated = rates.bar(places, [chosen[name].per_second for name in names], width, label=label)
        rates.bar_label(rated, fmt="%.0f", fontsize=8)
        medians = latencies.bar(places, [chosen[name].p50_ms for name in names], width, label=f"{label}, median")
        latencies.bar_label(medians, fmt="%.0f", fontsize=8)
        worst, label = [chosen[name].p99_ms for name in names], "" if position else "99th percentile"
        latencies.plot(places, worst, "_", markersize=14, color="black", label=label)
    for axes in (rates, latencies):
        axes.set_xticks([index + 0.4 * (len(counts) - 1) / len(counts) for index in range(len(names))], names)
        axes.legend(fontsize=8)
    rates.set_ylabel("requests a second, audit log on")
    latencies.set_ylabel("milliseconds")
    latencies.set_yscale("log")
    figure.suptitle(report.header, fontsize=9)
    figure.savefig(path, dpi=110)
