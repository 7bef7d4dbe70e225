"""The attack that works: a passive host logs activations and deltas, and solves for the adapter.

    python examples/extraction/extract.py [--quick] [--picture FILE] [--json FILE] [--model DIR]

Encrypts through the real engine with every protection in place, as an admitted and honest host does, keeps what it
sees (x and z), and solves least squares. Prints the error of the recovered B·A, and of a clone's deltas on the host's
own traffic, by the number of logged tokens. Then the same against a coprocessor that meters, where the attack ends at
the budget. Traffic is synthetic unless --model names the demo model (see `make model`); then its real activations are
used as well. Takes under a minute; docs/threat-model.md says what follows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.he_lora.metering import TokenMeter
from tensorguard.ckks import (
    EncodedGroup,
    EncryptedActivations,
    EvaluatedRows,
    Evaluator,
    GroupWeights,
    HostSession,
    compile_plans,
    get_parameter_set,
    select_plan,
)
from tensorguard.errors import BudgetExhaustedError
from tensorguard.evidence.release import LeaseTerms
from tensorguard.lora.adapter import LoraAdapter, LoraModule
from tensorguard.lora.groups import RoundedGroup, build_group

ROOT = Path(__file__).resolve().parent.parent.parent
LAYER, GROUP = 15, "qkv"
BATCH = 64
HELD_OUT = 256
SESSION = b"extraction example"
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """What is to be stolen. `delta` is the secret s·B·A of the whole group, for judging the result only."""

    group: RoundedGroup
    delta: Values


def demo_target() -> Target:
    """q, k and v of one layer of the demo adapter: rank 16 each, 576 channels."""
    adapter = LoraAdapter.load(ROOT / "examples" / "demo_adapter" / "adapter")
    return target({key: module for key, module in adapter.modules.items() if key[0] == LAYER and key[1] != "o_proj"})


def small_target(d_in: int = 64, rank: int = 4) -> Target:
    """A random adapter of a tiny layer."""
    generator = np.random.default_rng(1)
    modules = {
        (LAYER, name): LoraModule(
            A=generator.normal(size=(rank, d_in)).astype(np.float32),
            B=generator.normal(size=(48, rank)).astype(np.float32),
            scaling=2.0,
        )
        for name in ("q_proj", "k_proj", "v_proj")
    }
    return target(modules)


def target(modules: dict[tuple[int, str], LoraModule]) -> Target:
    group = build_group(LAYER, GROUP, modules, get_parameter_set("n4096-q90-w12"))
    deltas = [modules[LAYER, p.name] for p in group.projections]
    return Target(group, np.vstack([m.scaling * m.B.astype(np.float64) @ m.A.astype(np.float64) for m in deltas]))


class Coprocessor:
    """Holds the weights, charges before it evaluates (as `services.he_lora.evaluation` does) and answers."""

    def __init__(self, target: Target, host: HostSession, pk1_seed: bytes, budget: int) -> None:
        group, parameters = target.group, host.parameters
        self.plans = compile_plans(parameters, group.d_in, group.rows)
        exponents = tuple(p.scale_exponent for p in group.projections for _ in range(p.rank))
        self._weights = GroupWeights(group.integers, exponents, group.norm_bound)
        self._encoded = EncodedGroup(self._weights, parameters, self.plans)
        self._evaluator = Evaluator(parameters, host.public_key, pk1_seed, SESSION)
        self.row_scales = self._weights.row_scales
        self._meter = TokenMeter(LeaseTerms("example", int(time.time()) + 3600, budget))

    def evaluate(self, sent: EncryptedActivations) -> EvaluatedRows:
        """Raises BudgetExhaustedError."""
        self._meter.charge(LAYER, GROUP, sent.tokens)
        return self._evaluator.evaluate(self._encoded, sent.plan, sent.tokens, sent.ids, sent.seeds, sent.b)


def log_tokens(target: Target, x: Values, budget: int = 1 << 40) -> Values:
    """z [T, rows] of as many of these tokens as the coprocessor answers."""
    parameters, seed = get_parameter_set("n4096-q90-w12"), os.urandom(32)
    host = HostSession.create(parameters, seed, SESSION)
    coprocessor = Coprocessor(target, host, seed, budget)
    group, logged = target.group, [np.empty((0, target.group.rows))]
    size = BATCH
    start = 0
    while start < len(x):
        rows = x[start : start + size]
        plan = select_plan(coprocessor.plans, parameters, len(rows), group.d_in, group.rows)
        sent = host.encrypt(rows, plan, group.norm_bound)
        try:
            response = coprocessor.evaluate(sent)
        except BudgetExhaustedError:
            if size == 1:
                break
            size = 1  # what is left of the budget, token by token
            continue
        logged.append(host.decrypt(sent, response, group.rows, coprocessor.row_scales))
        start += len(rows)
    host.close()
    return np.concatenate(logged)


def solve(target: Target, x: Values, z: Values) -> Values:
    """The recovered s·B·A: least squares for A' (of smallest norm where tokens are too few), times the public U."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)  # the noise of z grows with the norm
    weights = np.linalg.lstsq(x / norms, z / norms, rcond=None)[0].T
    deltas = [
        target.group.u[p.name].astype(np.float64) @ weights[p.row_offset : p.row_offset + p.rank]
        for p in target.group.projections
    ]
    return np.vstack(deltas)


def judge(target: Target, found: Values, traffic: Values) -> tuple[float, float]:
    """Relative error of B·A, and of its deltas on traffic that was not logged (root mean square)."""
    matrix = np.linalg.norm(found - target.delta) / np.linalg.norm(target.delta)
    deltas = np.linalg.norm(traffic @ (found - target.delta).T) / np.linalg.norm(traffic @ target.delta.T)
    return float(matrix), float(deltas)


def independent_tokens(d_in: int, count: int) -> Values:
    """White: the fastest way to the whole matrix."""
    return np.random.default_rng(2).normal(size=(count, d_in))


def correlated_tokens(d_in: int, count: int) -> Values:
    """Like a model's activations in that few directions hold most of the energy: the k-th has 1/k of the first."""
    generator = np.random.default_rng(3)
    directions = np.linalg.qr(generator.normal(size=(d_in, d_in)))[0]
    return (generator.normal(size=(count, d_in)) / np.sqrt(np.arange(1, d_in + 1))) @ directions


def model_tokens(model_dir: Path, count: int) -> Values:
    """What the layer is given while the demo model reads its twenty questions and answers to them, in random order."""
    from tensorguard.models.activations import capture

    report = json.loads((ROOT / "examples" / "demo_adapter" / "adapter" / "report.json").read_text())
    chats = [
        [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["base"]}]
        for answer in report["answers"]
    ]
    x = capture(model_dir, chats, count, {(LAYER, GROUP)})[LAYER, GROUP].astype(np.float64)
    return np.random.default_rng(4).permutation(x)


def attack(name: str, target: Target, x: Values, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Errors by the number of logged tokens, out of one log."""
    x, traffic = x[:-HELD_OUT], x[-HELD_OUT:]
    counts = [count for count in counts if count <= len(x)]
    z = log_tokens(target, x[: max(counts)])
    records = []
    for count in counts:
        matrix, deltas = judge(target, solve(target, x[:count], z[:count]), traffic)
        records.append({"tokens": name, "logged": count, "matrix_error": matrix, "own_traffic_error": deltas})
        print(f"{name:<28}{count:>8}{matrix:>14.1e}{deltas:>20.1e}")
    return records


def metered_attack(target: Target, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """The same log against budgets: it ends with the budget, wherever that is."""
    d_in = target.group.d_in
    x = independent_tokens(d_in, 3 * d_in + HELD_OUT)
    x, traffic = x[:-HELD_OUT], x[-HELD_OUT:]
    records = []
    for budget in budgets:
        z = log_tokens(target, x, budget)
        if len(z) != budget:
            raise SystemExit(f"the meter let {len(z)} tokens through under a budget of {budget}: a defect")
        matrix, deltas = judge(target, solve(target, x[: len(z)], z), traffic)
        records.append({"budget": budget, "answered": len(z), "matrix_error": matrix, "own_traffic_error": deltas})
        print(f"budget {budget:<21}{len(z):>8}{matrix:>14.1e}{deltas:>20.1e}   then refused: budget_exhausted")
    return records


def draw(records: list[dict[str, Any]], d_in: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {
        "matrix_error": "error of the recovered B·A",
        "own_traffic_error": "error of a clone's deltas, own traffic",
    }
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for name in dict.fromkeys(r["tokens"] for r in records):
            chosen = [r for r in records if r["tokens"] == name]
            axis.plot([r["logged"] for r in chosen], [r[field] for r in chosen], marker="o", label=name)
        axis.axvline(d_in, color="grey", linestyle="--", linewidth=1)
        axis.set(yscale="log", xlabel="logged tokens (dashed: d_in)", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny adapter: shows the effect in seconds")
    parser.add_argument("--picture", type=Path, help="draw the errors into this PNG file")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--model", type=Path, help="folder of the demo model: attack with its real activations too")
    options = parser.parse_args(arguments)
    if options.quick and options.model:
        parser.error("--quick has an adapter of its own, which does not fit --model")
    target = small_target() if options.quick else demo_target()
    d_in = target.group.d_in
    counts = [round(share * d_in) for share in (0.125, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 25 / 12, 4)]
    sources: dict[str, Callable[[], Values]] = {
        "independent tokens": lambda: independent_tokens(d_in, max(counts) + HELD_OUT),
        "correlated tokens": lambda: correlated_tokens(d_in, max(counts) + HELD_OUT),
    }
    if options.model:
        sources["SmolLM2's own activations"] = lambda: model_tokens(options.model, max(counts) + HELD_OUT)
    print(f"{target.group.rows} rows of {d_in} channels; relative errors\n")
    print(f"{'':<28}{'logged':>8}{'B·A':>14}{'own traffic':>20}")
    records = [record for name, make in sources.items() for record in attack(name, target, make(), counts)]
    print("\nagainst a metered coprocessor (independent tokens)")
    metered = metered_attack(target, [d_in // 4, d_in // 2, d_in, 2 * d_in])
    result = {"d_in": d_in, "rows": target.group.rows, "unmetered": records, "metered": metered}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(records, d_in, options.picture)
    return result


if __name__ == "__main__":
    main()
