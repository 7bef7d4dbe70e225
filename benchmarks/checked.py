"""What checked mode costs, and which changes of a response it finds (docs/protocol.md, "Checked mode").

    python benchmarks/checked.py [--quick] [--json FILE]

One thread, both sides in this process; milliseconds are medians of this thread's CPU time, so that a busy machine
does not decide. Changes are made to one value of one token, by a coprocessor that
knows the format but not the check row's weights; the last column of the first table is without checked mode.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorguard.ckks import (
    EncodedGroup,
    EncryptedActivations,
    EvaluatedRows,
    Evaluator,
    GroupWeights,
    HostSession,
    Plan,
    compile_plans,
    get_parameter_set,
    select_plan,
)
from tensorguard.errors import InvalidInputError

SESSION = b"checked benchmark"
ROWS = 48
CHANGES = ("c0", "c0, check row guessed", "c1")


@dataclass(frozen=True)
class Cost:
    """Of one call. Bytes are those of the arrays; frames add about 50."""

    d_in: int
    tokens: int
    checked: bool
    plan: str
    bytes_up: int
    bytes_down: int
    encrypt_ms: float
    evaluate_ms: float
    decrypt_ms: float


class Bench:
    """Both sides of one session, with one group."""

    def __init__(self, d_in: int, plans: Sequence[Plan] | None = None) -> None:
        self.parameters = get_parameter_set("n4096-q90-w12")
        self.d_in, seed = d_in, os.urandom(32)
        self.host = HostSession.create(self.parameters, seed, SESSION)
        self.evaluator = Evaluator(self.parameters, self.host.public_key, seed, SESSION)
        self.plans = tuple(plans or compile_plans(self.parameters, d_in, ROWS, (1, 2, 8, 16, 64)))
        # Statistical generators: test data, not secrets.
        self.generator = np.random.default_rng(0)
        bound = self.parameters.norm_bound(d_in, 16)
        integers = self.generator.integers(-4000, 4000, (ROWS, d_in), dtype=np.int32)
        self.weights = GroupWeights(integers, (10,) * ROWS, bound)
        self.group = EncodedGroup(self.weights, self.parameters, self.plans)

    def encrypt(self, tokens: int, checked: bool) -> EncryptedActivations:
        plan = select_plan(self.plans, self.parameters, tokens + checked, self.d_in, ROWS)
        x = self.generator.normal(size=(tokens, self.d_in))
        return self.host.encrypt(x, plan, self.weights.norm_bound, checked=checked)

    def evaluate(self, sent: EncryptedActivations) -> EvaluatedRows:
        return self.evaluator.evaluate(self.group, sent.plan, sent.tokens, sent.ids, sent.seeds, sent.b)

    def accepts(self, sent: EncryptedActivations, response: EvaluatedRows) -> bool:
        try:
            self.host.decrypt(sent, response, ROWS, self.weights.row_scales)
        except InvalidInputError:
            return False
        return True

    def cost(self, tokens: int, checked: bool, repeat: int) -> Cost:
        times: list[tuple[float, float, float]] = []
        for _ in range(repeat + 1):
            begun = time.thread_time()
            sent = self.encrypt(tokens, checked)
            encrypted = time.thread_time()
            response = self.evaluate(sent)
            evaluated = time.thread_time()
            if not self.accepts(sent, response):
                raise SystemExit("an honest response was refused: a defect")
            times.append((encrypted - begun, evaluated - encrypted, time.thread_time() - evaluated))
        encrypt, evaluate, decrypt = (1e3 * statistics.median(column[1:]) for column in zip(*times, strict=True))
        up = sent.b.nbytes + sent.ids.nbytes + len(sent.seeds)
        down = response.c1.nbytes + response.c0.nbytes
        return Cost(self.d_in, tokens, checked, sent.plan.identifier, up, down, encrypt, evaluate, decrypt)

    def detection(self, tokens: int, change: str, size: int, checked: bool, trials: int) -> float:
        """Share of changed responses that are refused."""
        prime, refused = self.parameters.primes[0], 0
        for _ in range(trials):
            sent = self.encrypt(tokens, checked)
            response = self.evaluate(sent)
            c1, c0 = response.c1.astype(np.int64), response.c0.astype(np.int64)
            delta = size * int(self.generator.choice((-1, 1)))
            token, row = self.generator.integers(tokens), self.generator.integers(ROWS)
            if change == "c1":
                c1[self.generator.integers(len(c1)), self.generator.integers(c1.shape[1])] += delta
            else:
                c0[token, row] += delta
            if change == "c0, check row guessed":
                c0[-1, row] += round(delta * self.generator.uniform(0.5, 1.0) * self.generator.choice((-1, 1)))
            changed = EvaluatedRows((c1 % prime).astype(np.uint32), (c0 % prime).astype(np.uint32))
            refused += not self.accepts(sent, changed)
        return refused / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the records here")
    options = parser.parse_args()
    trials, repeat = (50, 3) if options.quick else (1000, 51)
    bench = Bench(64, [Plan(1, 64, 48), Plan(2, 64, 32), Plan(8, 64, 8)])
    print(f"{'change of one value by':<36}{'tokens':>8}{'found':>9}{'unchecked':>11}")
    found: list[dict[str, Any]] = []
    for tokens in (1, 7):
        for change in CHANGES:
            for power in (9, 11, 14, 20):
                with_check = bench.detection(tokens, change, 1 << power, True, trials)
                # Without a check row there is none to guess.
                without = (
                    None if "guess" in change else bench.detection(tokens, change, 1 << power, False, trials // 10)
                )
                found.append(
                    {"tokens": tokens, "change": change, "log2": power, "found": with_check, "unchecked": without}
                )
                shown = "-" if without is None else f"{without:.1%}"
                print(f"{f'2^{power} in {change}':<36}{tokens:>8}{with_check:>9.1%}{shown:>11}")
    print(f"\n{'d_in':>5}{'tokens':>8}{'checked':>9}{'plan':>13}{'KiB up':>9}{'KiB down':>10}", end="")
    print(f"{'encrypt ms':>12}{'evaluate ms':>13}{'decrypt ms':>12}")
    costs = []
    for d_in in (576, 4096):
        bench = Bench(d_in)
        for tokens in (1, 8, 64):
            for checked in (False, True):
                c = bench.cost(tokens, checked, repeat)
                costs.append(asdict(c))
                print(f"{d_in:>5}{tokens:>8}{checked!s:>9}{c.plan:>13}{c.bytes_up / 1024:>9.0f}", end="")
                print(f"{c.bytes_down / 1024:>10.0f}{c.encrypt_ms:>12.2f}{c.evaluate_ms:>13.2f}{c.decrypt_ms:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps({"detection": found, "cost": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
