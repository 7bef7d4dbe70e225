"""What one ciphertext up, one down and one product cost on this machine: the numbers behind the planner's costs.

    python benchmarks/he_kernels.py [--json FILE] [--repeat N]

One thread, both sides in this process, no network: the planner's constants (tensorguard/ckks/plan.py) are larger by
what sending 48 KiB up and 16 KiB down costs. Every figure is the median of N runs. The coprocessor's time is taken
apart by least squares over shapes with different numbers of uploads, downloads and products.
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

import numpy as np

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, HostSession, Plan, get_parameter_set
from tensorguard.ckks.plan import DOWNLOAD_COST, PRODUCT_COST, UPLOAD_COST, compile_plans, select_plan

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


class Bench:
    """A host and an evaluator with one session key."""

    def __init__(self, repeat: int) -> None:
        self.parameters = get_parameter_set("n4096-q90-w12")
        seed = os.urandom(32)
        self.host = HostSession.create(self.parameters, seed, SESSION)
        self.evaluator = Evaluator(self.parameters, self.host.public_key, seed, SESSION)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeat", type=int, default=101)
    options = parser.parse_args()
    bench = Bench(options.repeat)
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
    print("\nmicroseconds, one thread      made    expanded or     read    sum   planner counts")
    print("                                    re-randomised                  (with sending)")
    rows = [
        ("a ciphertext up", upload, evaluate[0], 0.0, UPLOAD_COST),
        ("a ciphertext down", 0.0, evaluate[1], download, DOWNLOAD_COST),
        ("a product", 0.0, evaluate[2], 0.0, PRODUCT_COST),
    ]
    for name, made, work, read, counted in rows:
        print(f"{name:<26}{made:>9.1f}{work:>15.1f}{read:>9.1f}{made + work + read:>7.1f}{counted:>17.1f}")
    best = select_plan(compile_plans(bench.parameters, 4096, 48), bench.parameters, 1, 4096, 48)
    print(f"\nthe planner's choice for one token, 4096 channels, 48 rows: {best.identifier}")
    if options.json:
        options.json.write_text(json.dumps({"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
