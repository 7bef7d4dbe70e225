"""One product z = A·x as every engine gets it, and the one way in which it is timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

LONG_SECONDS = 10.0
"""An engine slower than this for one product runs once, and only for one token."""

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Case:
    """A is [rows, d], `tokens` vectors x are multiplied. `plan` is TenSafe's choice (tokens, channels, rows per
    polynomial) for engines with coefficient encoding. At least `repeats` runs and `steady_tokens` tokens are timed by
    TenSafe, up to `repeats` by the others, and once `seconds` have passed no more than three. What is predicted to
    take longer than `longest_seconds` is not run.
    """

    d: int
    rows: int
    tokens: int
    plan: tuple[int, int, int]
    repeats: int
    steady_tokens: int
    seconds: float
    longest_seconds: float

    def weights(self) -> Matrix:
        """float64 [rows, d], entries of deviation 1/sqrt(d). The same in every process: not a secret."""
        return np.random.default_rng((1, self.d, self.rows)).normal(size=(self.rows, self.d)) / np.sqrt(self.d)

    def activations(self, number: int) -> Matrix:
        """float64 [tokens, d], another one for every run."""
        return np.random.default_rng((2, self.d, self.tokens, number)).normal(size=(self.tokens, self.d))


class Engine(Protocol):
    """What is timed. `prepare` comes first; one call of each step follows another."""

    name: str
    """Given by whoever made it."""
    function_private: bool
    note: str
    key_bytes: int
    """All key material that the evaluating side needs, evaluation keys included."""
    evaluation_key_bytes: int
    """Of these, keys for rotations and relinearisation."""
    steady: bool
    """Whether every run needs material of its own, so that a steady state has to be measured."""

    def measured_channels(self, d: int) -> int:
        """Of d input channels, how many are computed with; time and upload of the others are scaled."""

    def batches(self, d: int, tokens: int) -> int:
        """How many times the work for one token is done."""

    def prepare(self, weights: Matrix, case: Case) -> None: ...

    def refill(self) -> None:
        """What happens in idle time between two products."""

    def encrypt(self, x: Matrix) -> Any: ...

    def evaluate(self, request: Any) -> Any: ...

    def decrypt(self, request: Any, response: Any) -> Matrix:
        """float64 [tokens, rows]."""

    def sizes(self, request: Any, response: Any) -> tuple[int, int]:
        """Bytes up and down as they travel."""


class Skipped(Exception):  # noqa: N818 - an outcome, not a failure
    """This engine does not run this case. The message says why."""


Times = tuple[float, float, float]


@dataclass
class History:
    """CPU seconds of one batch, by (d, rows), to predict what the next shape will take."""

    seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    def predict(self, engine: Engine, case: Case) -> float:
        """Seconds of one product; for a shape that did not run yet, by the others' time per channel."""
        batches = engine.batches(case.d, case.tokens)
        if (case.d, case.rows) in self.seconds:
            return self.seconds[case.d, case.rows] * batches
        per_channel = (seconds / engine.measured_channels(d) for (d, _), seconds in self.seconds.items())
        return max(per_channel, default=0.0) * engine.measured_channels(case.d) * batches


def measure(engine: Engine, case: Case, history: History) -> dict[str, Any]:
    """The record of a case. Times are medians of the process's CPU time in milliseconds.

    CPU time, because what else runs on the machine does not count then, while helper threads of an engine do. The
    error is ‖ẑ - A·x‖ / ‖A·x‖ over all runs against float64. Raises Skipped.
    """
    predicted = history.predict(engine, case)
    if predicted > (case.longest_seconds if case.tokens == 1 else LONG_SECONDS):
        raise Skipped(f"one product would take about {predicted:.0f} s")
    channels = engine.measured_channels(case.d)
    share = case.d / channels
    weights = case.weights()[:, :channels]
    engine.prepare(weights, case)
    # The first run fills caches. It counts only when there is time for no other.
    spent, error, sizes = _run(engine, case, weights, 0)
    runs, errors = [spent], [error]
    if sum(spent) <= LONG_SECONDS:
        started = time.perf_counter()
        runs, errors = [], []
        while len(runs) < _enough(engine, case, time.perf_counter() - started):
            spent, error, sizes = _run(engine, case, weights, 1 + len(runs))
            runs.append(spent)
            errors.append(error)
    history.seconds[case.d, case.rows] = min(map(sum, runs)) / engine.batches(case.d, case.tokens)
    encrypt, evaluate, decrypt = (1e3 * statistics.median(column) for column in zip(*runs, strict=True))
    notes = [engine.note] if engine.note else []
    if channels < case.d:
        notes.append(f"measured on {channels} of {case.d} channels; time and upload scaled by {share:g}")
    return {
        "engine": engine.name,
        "d": case.d,
        "rows": case.rows,
        "tokens": case.tokens,
        "encrypt_ms": share * encrypt,
        "evaluate_ms": share * evaluate,
        "decrypt_ms": decrypt,
        "bytes_up": round(share * sizes[0]),
        "bytes_down": sizes[1],
        "key_bytes": engine.key_bytes,
        "rel_error": statistics.fmean(errors) ** 0.5,
        "function_private": engine.function_private,
        "evaluation_key_bytes": engine.evaluation_key_bytes,
        "repeats": len(runs),
        "note": "; ".join(notes),
    }


def _enough(engine: Engine, case: Case, seconds: float) -> int:
    """Runs to make when `seconds` have passed."""
    if engine.steady:
        return max(case.repeats, -(-case.steady_tokens // case.tokens))
    return min(case.repeats, 3) if seconds > case.seconds else case.repeats


def _run(engine: Engine, case: Case, weights: Matrix, number: int) -> tuple[Times, float, tuple[int, int]]:
    """CPU seconds of the three steps, squared relative error, bytes up and down."""
    x = case.activations(number)[:, : weights.shape[1]]
    engine.refill()
    start = time.process_time()
    request = engine.encrypt(x)
    encrypted = time.process_time()
    response = engine.evaluate(request)
    evaluated = time.process_time()
    z = engine.decrypt(request, response)
    end = time.process_time()
    exact = x @ weights.T
    error = float(((z - exact) ** 2).sum() / (exact**2).sum())
    return (encrypted - start, evaluated - encrypted, end - evaluated), error, engine.sizes(request, response)


def from_json(values: dict[str, Any]) -> Case:
    return Case(**{**values, "plan": tuple(values["plan"])})


def to_json(case: Case) -> dict[str, Any]:
    return asdict(case)
