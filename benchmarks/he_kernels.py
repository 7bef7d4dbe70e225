"""What the encrypted product costs on this machine: its transforms, one ciphertext up, one down and one product, and a
whole model.

    python benchmarks/he_kernels.py [--json FILE] [--repeat N] [--threads N] [--only {transforms,costs,model}]

One thread unless told otherwise, both sides in this process, no network. Every figure is the median of N runs. The
coprocessor's time is taken apart by least squares over shapes with different numbers of uploads, downloads and
products. The model is the attention of Llama-3-8B, 32 layers of q, k, v (48 rows) and o (16 rows) over 4096 channels;
the weights of all layers are resident and pass through the processor once a token, as when serving.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, HostSession, Plan, get_parameter_set, ntt
from tensorguard.ckks.arrays import aligned
from tensorguard.ckks.planner import compile_plans, select_plan
from tensorguard.ckks.ring import ring

SESSION = b"he_kernels benchmark"
# (tokens, d_in, rows, plan): few and many of each of uploads, downloads and products.
SHAPES = [
    (1, 576, 48, Plan(1, 64, 48)),
    (1, 576, 48, Plan(1, 576, 7)),
    (1, 4096, 48, Plan(1, 256, 16)),
    (1, 4096, 16, Plan(1, 256, 16)),
    (1, 1024, 128, Plan(1, 1024, 4)),
    (8, 576, 48, Plan(8, 64, 8)),
    (8, 4096, 48, Plan(8, 64, 8)),
]


def median_us(runs: Iterable[Callable[[], Any]]) -> float:
    """Of all runs but the first, which compiles."""
    times = []
    for run in runs:
        started = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times[1:])


@numba.njit
def repeat_forward(source: Any, target: Any, factors: Any, prime: Any, count: int) -> None:
    for _ in range(count):
        ntt.forward(source, target, factors, prime)


@numba.njit
def repeat_inverse(source: Any, target: Any, factors: Any, prime: Any, count: int) -> None:
    for _ in range(count):
        ntt.inverse(source, target, factors, prime)


def nominal_ghz() -> float | None:
    """The clock of the first processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split(":")[1]) / 1000 for line in lines if line.startswith("cpu MHz")), None)


def transforms() -> list[dict[str, Any]]:
    """Microseconds of one transform modulo one prime, from runs of 100: the median and, as other work on a shared
    machine only ever adds, the least."""
    records = []
    for name in ("n4096-q90-w12", "n8192-q150-w12"):
        parameters = get_parameter_set(name)
        constants = ring(parameters)
        source, target = (aligned(np.ones(parameters.degree, np.uint32)) for _ in range(2))
        for direction, run in (("forward", repeat_forward), ("inverse", repeat_inverse)):
            times = []
            for _ in range(401):
                started = time.perf_counter()
                run(source, target, constants.factors[0], constants.primes[0], 100)
                times.append(1e4 * (time.perf_counter() - started))
            least, ghz = min(times[1:]), nominal_ghz()
            records.append(
                {
                    "degree": parameters.degree,
                    "direction": direction,
                    "median_us": statistics.median(times[1:]),
                    "least_us": least,
                    "least_cycles": least * 1e3 * ghz if ghz else None,
                }
            )
    return records


class Bench:
    """A host and an evaluator with one session key."""

    def __init__(self, repeat: int, threads: int) -> None:
        self.parameters = get_parameter_set("n4096-q90-w12")
        seed = os.urandom(32)
        self.host = HostSession.create(self.parameters, seed, SESSION)
        self.evaluator = Evaluator(self.parameters, self.host.public_key, seed, SESSION, threads=threads)
        self.repeat = repeat
        # Statistical generator: test data, not a secret.
        self.generator = np.random.default_rng(0)

    def measure(self, tokens: int, d_in: int, rows: int, plan: Plan) -> dict[str, Any]:
        bound = self.parameters.norm_bound(d_in, min(rows, 16))
        integers = self.generator.integers(-1000, 1000, (rows, d_in), dtype=np.int32)
        group = EncodedGroup(GroupWeights(integers, (10,) * rows, bound), self.parameters, [plan])
        scales = np.exp2(-np.full(rows, 10.0))
        x = self.generator.normal(size=(tokens, d_in))
        encrypt = median_us([lambda: self.host.encrypt(x, plan, bound)] * (self.repeat + 1))
        # An identifier is accepted once, so every evaluation gets an input of its own.
        inputs = (self.host.encrypt(x, plan, bound) for _ in range(self.repeat + 1))
        evaluate = median_us(
            partial(self.evaluator.evaluate, group, plan, tokens, sent.ids, sent.seeds, sent.b) for sent in inputs
        )
        sent = self.host.encrypt(x, plan, bound)
        response = self.evaluator.evaluate(group, plan, tokens, sent.ids, sent.seeds, sent.b)
        decrypt = median_us([lambda: self.host.decrypt(sent, response, rows, scales)] * (self.repeat + 1))
        return {
            "plan": plan.identifier,
            "tokens": tokens,
            "d_in": d_in,
            "rows": rows,
            "uploads": plan.uploads(tokens, d_in),
            "downloads": plan.downloads(tokens, rows),
            "products": plan.chunks(tokens) * plan.polynomials(d_in, rows),
            "encrypt_us": encrypt,
            "evaluate_us": evaluate,
            "decrypt_us": decrypt,
        }

    def model(self, tokens: int, repeat: int, layers: int = 32, d_in: int = 4096) -> dict[str, Any]:
        """One pass of ``tokens`` tokens through the groups of all layers."""
        groups, bound = [], self.parameters.norm_bound(d_in, 16)
        for _ in range(layers):
            for rows in (48, 16):
                plan = select_plan(compile_plans(self.parameters, d_in, rows), self.parameters, tokens, d_in, rows)
                integers = self.generator.integers(-1000, 1000, (rows, d_in), dtype=np.int32)
                weights = GroupWeights(integers, (10,) * rows, bound)
                groups.append((EncodedGroup(weights, self.parameters, [plan]), plan, weights))
        x = self.generator.normal(size=(tokens, d_in))
        passes = []
        for _ in range(repeat + 1):
            spent = np.zeros(3)
            for group, plan, weights in groups:
                times = [time.perf_counter()]
                sent = self.host.encrypt(x, plan, bound)
                times.append(time.perf_counter())
                response = self.evaluator.evaluate(group, plan, tokens, sent.ids, sent.seeds, sent.b)
                times.append(time.perf_counter())
                self.host.decrypt(sent, response, group.rows, weights.row_scales)
                times.append(time.perf_counter())
                spent += np.diff(times)
            passes.append(1e3 * spent)
        median, least = np.median(passes[1:], axis=0), np.min(passes[1:], axis=0)
        return {
            "model": "Llama-3-8B, q k v o, rank 16",
            "groups": len(groups),
            "tokens": tokens,
            "plans": sorted({plan.identifier for _, plan, _ in groups}),
            "resident_bytes": sum(group.nbytes for group, _, _ in groups),
            "encrypt_ms": median[0],
            "evaluate_ms": median[1],
            "decrypt_ms": median[2],
            "least_encrypt_ms": least[0],
            "least_evaluate_ms": least[1],
            "least_decrypt_ms": least[2],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeat", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1, help="of the coprocessor")
    parser.add_argument("--only", choices=("transforms", "costs", "model"), help="one part of the report")
    options = parser.parse_args()
    parts = (options.only,) if options.only else ("transforms", "costs", "model")
    report: dict[str, Any] = {"threads": options.threads}
    bench = Bench(options.repeat, options.threads)
    if "transforms" in parts:
        report["transforms"] = show_transforms()
    if "costs" in parts:
        report["records"] = show_costs(bench)
    if "model" in parts:
        report["models"] = show_model(bench)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def show_transforms() -> list[dict[str, Any]]:
    records = transforms()
    print(f"{'transform':<12}{'degree':>8}{'median us':>11}{'least us':>10}{'cycles':>9}")
    for r in records:
        cycles = f"{r['least_cycles']:.0f}" if r["least_cycles"] else "?"
        print(f"{r['direction']:<12}{r['degree']:>8}{r['median_us']:>11.2f}{r['least_us']:>10.2f}{cycles:>9}")
    print()
    return records


def show_model(bench: Bench) -> list[dict[str, Any]]:
    records = [bench.model(tokens, repeat) for tokens, repeat in ((1, 15), (8, 7), (64, 3))]
    print(f"\n{'milliseconds for ' + records[0]['model']:<44}{'encrypt':>9}{'evaluate':>10}{'decrypt':>9}{'least':>8}")
    for r in records:
        name = f"{r['tokens']} tokens, {r['groups']} groups, {r['resident_bytes'] / 2**20:.0f} MiB"
        print(f"{name:<44}{r['encrypt_ms']:>9.1f}{r['evaluate_ms']:>10.1f}{r['decrypt_ms']:>9.1f}", end="")
        print(f"{r['least_evaluate_ms']:>8.1f}")
    return records


def show_costs(bench: Bench) -> list[dict[str, Any]]:
    records = []
    for number, shape in enumerate(SHAPES, 1):
        print(f"\rshape {number} of {len(SHAPES)}", end="", file=sys.stderr, flush=True)
        records.append(bench.measure(*shape))
    print(file=sys.stderr)
    counts = np.array([[r["uploads"], r["downloads"], r["products"]] for r in records], float)
    spent = np.array([r["evaluate_us"] for r in records])
    # Relative errors count, so that the largest shape does not decide alone.
    evaluate = np.linalg.lstsq(counts / spent[:, None], np.ones(len(records)), rcond=None)[0]
    upload = statistics.median(r["encrypt_us"] / r["uploads"] for r in records)
    download = statistics.median(r["decrypt_us"] / r["downloads"] for r in records)
    print(f"{'plan':<12}{'T':>3}{'d_in':>6}{'rows':>6}{'up':>5}{'down':>6}{'products':>10}", end="")
    print(f"{'encrypt us':>12}{'evaluate us':>13}{'decrypt us':>12}")
    for r in records:
        print(
            f"{r['plan']:<12}{r['tokens']:>3}{r['d_in']:>6}{r['rows']:>6}{r['uploads']:>5}{r['downloads']:>6}", end=""
        )
        print(f"{r['products']:>10}{r['encrypt_us']:>12.0f}{r['evaluate_us']:>13.0f}{r['decrypt_us']:>12.0f}")
    print("\nmicroseconds, one thread      made    expanded or     read    sum")
    print("                                    re-randomised")
    rows = [
        ("a ciphertext up", upload, evaluate[0], 0.0),
        ("a ciphertext down", 0.0, evaluate[1], download),
        ("a product", 0.0, evaluate[2], 0.0),
    ]
    for name, made, work, read in rows:
        print(f"{name:<26}{made:>9.1f}{work:>15.1f}{read:>9.1f}{made + work + read:>7.1f}")
    best = select_plan(compile_plans(bench.parameters, 4096, 48), bench.parameters, 1, 4096, 48)
    print(f"\nthe planner's choice for one token, 4096 channels, 48 rows: {best.identifier}")
    return records


if __name__ == "__main__":
    main()
