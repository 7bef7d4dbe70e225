"""How good the planner's choices are: every plan that can be best, timed, beside the one that is chosen.

    python benchmarks/planner.py [--quick] [--json FILE]     compare the choices with all plans
    python benchmarks/planner.py --measure [--json FILE]     measure the cost model anew; prints `Costs(...)` to paste

Times are those of one core (CPU time of the thread, so that other work on the machine counts little): encrypt,
evaluate with its encryptions of zero, decrypt. Bytes up and down count as the model has them, `--link-gigabytes` a
second. Of a plan's times the lower quartile counts. Few rounds over all plans are followed by more rounds over
the fastest, each stage timed afresh, since the fastest of many noisy times is mostly luck: the ratio is that of the
chosen plan to the fastest of the last three, in rounds that all of them share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, HostSession, ParameterSet, Plan, get_parameter_set
from tensorguard.ckks.ntt import forward_all, inverse_all
from tensorguard.ckks.planner import MEASURED, CallCost, Costs, call_cost, compile_plans, rank_plans, select_plan
from tensorguard.ckks.ring import ring

SESSION = b"planner benchmark"
# d_in, rows, tokens. Attention of SmolLM2-135M, of Llama-3-8B, its down projection, a small full-mode matrix.
CASES = [
    *((576, 48, tokens) for tokens in (1, 8, 64)),
    *((4096, 48, tokens) for tokens in (1, 4, 8, 64)),
    *((4096, 16, tokens) for tokens in (1, 8)),
    *((14336, 16, tokens) for tokens in (1, 8)),
    *((2048, 32, tokens) for tokens in (1, 2, 16, 32)),
    (576, 576, 1),
]
QUICK_CASES = [(576, 48, 1), (576, 48, 8), (4096, 48, 1), (4096, 16, 1), (4096, 48, 8)]
# What `--measure` fits: few and many of each of uploads, downloads and products.
FITTED = [
    (1, 576, 48, Plan(1, 64, 48)),
    (1, 576, 48, Plan(1, 576, 7)),
    (1, 576, 48, Plan(1, 320, 12)),
    (1, 4096, 48, Plan(1, 256, 16)),
    (1, 4096, 48, Plan(1, 1024, 4)),
    (1, 4096, 48, Plan(1, 512, 8)),
    (1, 4096, 16, Plan(1, 256, 16)),
    (1, 1024, 128, Plan(1, 1024, 4)),
    (8, 576, 48, Plan(8, 64, 8)),
    (8, 4096, 48, Plan(8, 128, 4)),
    (8, 4096, 48, Plan(8, 256, 2)),
    (8, 4096, 16, Plan(8, 512, 1)),
]


def lower_quartile(times: Sequence[float]) -> float:
    """Whatever else the machine does makes a run slower, never faster: the lower half of the times says more."""
    return sorted(times)[len(times) // 4]


def spent_us(runs: Iterable[Callable[[], Any]]) -> float:
    """CPU time, of all runs but the first, which compiles."""
    times = []
    for run in runs:
        started = time.thread_time_ns()
        run()
        times.append((time.thread_time_ns() - started) / 1e3)
    return lower_quartile(times[1:])


@dataclass(slots=True)
class Run:
    """One plan's weights and times, in microseconds."""

    group: EncodedGroup
    cost: CallCost
    times: list[float] = field(default_factory=list)

    @property
    def typical(self) -> float:
        return lower_quartile(self.times)


class Bench:
    """A host and an evaluator with one session key."""

    def __init__(self, parameters: ParameterSet, link_byte: float) -> None:
        self.parameters, self.link_byte = parameters, link_byte
        seed = os.urandom(32)
        self.host = HostSession.create(parameters, seed, SESSION)
        self.evaluator = Evaluator(parameters, self.host.public_key, seed, SESSION)
        # Statistical generator: test data, not a secret.
        self.generator = np.random.default_rng(0)

    def prepare(self, tokens: int, d_in: int, rows: int, plans: Iterable[Plan]) -> dict[Plan, Run]:
        """The same matrix encoded for each plan."""
        bound = self.parameters.norm_bound(d_in, min(rows, 16))
        integers = self.generator.integers(-1000, 1000, (rows, d_in), dtype=np.int32)
        weights = GroupWeights(integers, (10,) * rows, bound)
        return {
            plan: Run(
                EncodedGroup(weights, self.parameters, [plan]), call_cost(plan, self.parameters, tokens, d_in, rows)
            )
            for plan in plans
        }

    def call(self, run: Run, x: np.ndarray[Any, Any]) -> float:
        """One call under a plan: CPU microseconds of both sides, and the time of its bytes on the link."""
        plan, group = run.cost.plan, run.group
        bound = self.parameters.norm_bound(group.d_in, min(group.rows, 16))
        scales = np.exp2(-np.full(group.rows, 10.0))
        started = time.thread_time_ns()
        sent = self.host.encrypt(x, plan, bound)
        answer = self.evaluator.evaluate(group, plan, len(x), sent.ids, sent.seeds, sent.b)
        self.host.decrypt(sent, answer, group.rows, scales)
        spent = (time.thread_time_ns() - started) / 1e3
        return spent + self.link_byte * (run.cost.bytes_up + run.cost.bytes_down)

    def rounds(self, runs: Iterable[Run], x: np.ndarray[Any, Any], count: int) -> None:
        """``count`` timed calls of each, in an order drawn for each round, and each after an untimed one: when
        serving, layer after layer uses the same plan.
        """
        runs = list(runs)
        for run in runs:
            run.times.clear()
        for _ in range(count):
            for number in self.generator.permutation(len(runs)):
                self.call(runs[number], x)
                runs[number].times.append(self.call(runs[number], x))


def compare(bench: Bench, d_in: int, rows: int, tokens: int, repeat: int) -> dict[str, Any]:
    """The chosen plan against all that can be best, under the memory limit a package has by default."""
    chosen = select_plan(compile_plans(bench.parameters, d_in, rows), bench.parameters, tokens, d_in, rows)
    # With a T' of twice the tokens or more, half of it does the same with shorter transforms.
    ranked = [cost for cost in rank_plans(bench.parameters, tokens, d_in, rows) if cost.plan.tokens < 2 * tokens]
    runs = bench.prepare(tokens, d_in, rows, [cost.plan for cost in ranked])
    x = bench.generator.normal(size=(tokens, d_in))
    for count, kept, limit in ((1, len(runs), 2.0), (3, 6, 1.3), (repeat, 3, 1.3), (repeat, 3, 1.3)):
        bench.rounds(runs.values(), x, count)
        fastest = sorted(runs, key=lambda plan: runs[plan].typical)
        reach = limit * runs[fastest[0]].typical
        finalists = {plan for plan in fastest[:kept] if runs[plan].typical <= reach} | {chosen}
        runs = {plan: runs[plan] for plan in finalists}  # the others' weights need not stay in memory
    best = min(runs, key=lambda plan: runs[plan].typical)
    return {
        "d_in": d_in,
        "rows": rows,
        "tokens": tokens,
        "plans": len(ranked),
        "chosen": chosen.identifier,
        "chosen_us": runs[chosen].typical,
        "modelled_us": runs[chosen].cost.microseconds,
        "best": best.identifier,
        "best_us": runs[best].typical,
        "ratio": runs[chosen].typical / runs[best].typical,
    }


def measure(bench: Bench, repeat: int) -> Costs:
    """Fit the constants: transforms are timed alone, the rest is least squares over calls of different make."""
    constants = ring(bench.parameters)
    batch, primes, degree = 16, len(bench.parameters.primes), bench.parameters.degree
    source = bench.generator.integers(0, 1 << 29, (batch, primes, degree), dtype=np.uint32)
    target = np.empty_like(source)
    both = [
        spent_us(partial(kernel, source.copy(), target, constants.factors, constants.primes) for _ in range(repeat + 1))
        for kernel in (forward_all, inverse_all)
    ]
    transform = statistics.mean(both) / (batch * primes)
    runs = []
    for tokens, d_in, rows, plan in FITTED:
        (run,) = bench.prepare(tokens, d_in, rows, [plan]).values()
        runs.append((run, bench.generator.normal(size=(tokens, d_in))))
    for _ in range(repeat):
        for run, x in runs:
            bench.call(run, x)
            run.times.append(bench.call(run, x))
    nothing = Costs(transform=transform, upload=0.0, response=0.0, product=0.0, link_byte=bench.link_byte, call=0.0)
    features, spent = [], []
    for (run, _), (tokens, d_in, rows, plan) in zip(runs, FITTED, strict=True):
        base = call_cost(plan, bench.parameters, tokens, d_in, rows, nothing)
        features.append([1.0, base.uploads, base.downloads, base.products])
        spent.append((run.typical, run.typical - base.microseconds))
    total, rest = np.array(spent).T
    # Relative errors count, so that the largest shape does not decide alone.
    scaled = np.array(features) / total[:, None]
    solution = np.linalg.lstsq(scaled, rest / total, rcond=None)[0]
    costs = replace(
        nothing, call=solution[0], upload=solution[1], response=solution[2], product=solution[3], transform=transform
    )
    print(f"{'plan':<14}{'T':>4}{'d_in':>7}{'rows':>6}{'measured us':>13}{'model us':>11}")
    for (run, _), (tokens, d_in, rows, plan) in zip(runs, FITTED, strict=True):
        modelled = call_cost(plan, bench.parameters, tokens, d_in, rows, costs).microseconds
        print(f"{plan.identifier:<14}{tokens:>4}{d_in:>7}{rows:>6}{run.typical:>13.0f}{modelled:>11.0f}")
    if solution.min() < 0:
        sys.exit("a fitted cost is negative: the machine is too busy, or the model no longer describes the engine")
    return Costs(**{name: round(float(value), 3) for name, value in asdict(costs).items()})


def compare_all(bench: Bench, cases: Sequence[tuple[int, int, int]], repeat: int) -> list[dict[str, Any]]:
    """`compare` for each case, shown as soon as it is known."""
    print(f"{'d_in':>6}{'rows':>6}{'T':>4}{'plans':>7}  {'chosen':<14}{'us':>9}{'model':>9}  ", end="")
    print(f"{'fastest':<14}{'us':>9}{'ratio':>7}")
    records = []
    for case in cases:
        r = compare(bench, *case, repeat)
        records.append(r)
        print(
            f"{r['d_in']:>6}{r['rows']:>6}{r['tokens']:>4}{r['plans']:>7}  {r['chosen']:<14}{r['chosen_us']:>9.0f}"
            f"{r['modelled_us']:>9.0f}  {r['best']:<14}{r['best_us']:>9.0f}{r['ratio']:>7.2f}",
            flush=True,
        )
    print(f"\nworst ratio {max(r['ratio'] for r in records):.2f}")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="print the cost model's constants")
    parser.add_argument("--quick", action="store_true", help="few shapes and repetitions")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--parameters", default="n4096-q90-w12", help="parameter set")
    parser.add_argument("--repeat", type=int, help="rounds over the last plans (default 25; 9 when quick)")
    parser.add_argument(
        "--link-gigabytes", type=float, default=1e-3 / MEASURED.link_byte, help="gigabytes a second between the sides"
    )
    options = parser.parse_args()
    repeat = options.repeat or (9 if options.quick else 25)
    bench = Bench(get_parameter_set(options.parameters), 1e-3 / options.link_gigabytes)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": platform.processor() or platform.machine(),
        "parameters": options.parameters,
    }
    if options.measure:
        costs = measure(bench, repeat)
        print(f"\n{costs!r}")
        result["costs"] = asdict(costs)
    else:
        result["records"] = compare_all(bench, QUICK_CASES if options.quick else CASES, repeat)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
