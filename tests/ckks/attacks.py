"""What the attack tests share: guards to take out, and what an attacker knows or is given.

The attackers here get more than a response holds: the ciphertexts as they were before the modulus switch, modulo q,
and before e1 was added, which is noise in their way. The switch divides the noise of the inputs away and so hides a
missing flood from any test; the protocol's bound does not count on it, and neither do these tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.ckks import EncodedGroup, GroupWeights, Plan, kernels
from tensorguard.ckks.messages import EncryptedActivations, EvaluatedRows
from tests.ckks import reference, stepwise
from tests.ckks.conftest import SESSION, Pair

Values = npt.NDArray[Any]


def without_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flood", lambda words, residues, *_: residues.fill(0))


def with_narrow_flood(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """The sum of four uniform integers of ``bits`` bits."""

    def narrow(words: Values, residues: Values, *constants: Any) -> None:
        total = np.random.default_rng().integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (len(residues), 4)).sum(axis=1)
        residues[:] = total[:, None] % constants[-1].astype(np.int64)

    monkeypatch.setattr(kernels, "flood", narrow)


@dataclass
class Watch:
    """What passed through the evaluator's steps in the last evaluation."""

    pairs: dict[tuple[int, int], Values] = field(default_factory=dict)
    """(c0, c1) by response and prime, in the transform domain, uint32 [2, N], below 2p; without e1 and flood."""
    flood: Values = field(default_factory=lambda: np.empty(0))
    """f modulo each prime, uint32 [tokens, rows, primes]."""
    trits: Values = field(default_factory=lambda: np.empty(0))
    """u + 1, uint8 [responses, N]."""

    @classmethod
    def start(cls, monkeypatch: pytest.MonkeyPatch) -> Watch:
        """After guards were taken out."""
        watch, recover = cls(), kernels.recover

        def watch_evaluate(request: Any, hiding: Any, *rest: Any) -> None:
            watch.pairs = {}
            watch.trits, watch.flood = hiding[0].copy(), hiding[3].copy()
            stepwise.evaluate(request, hiding, *rest)

        def watch_recover(sums: Values, errors: Values, flood: Values, response: int, i: int, *rest: Any) -> None:
            watch.pairs[response, i] = sums.copy()
            recover(sums, errors, flood, response, i, *rest)

        monkeypatch.setattr(kernels, "evaluate", watch_evaluate)
        monkeypatch.setattr(kernels, "recover", watch_recover)
        return watch

    @property
    def sums(self) -> Values:
        """The pairs in one array: uint32 [responses, primes, 2, N]."""
        responses, primes = (1 + max(index) for index in zip(*self.pairs, strict=True))
        return np.stack([np.stack([self.pairs[r, i] for i in range(primes)]) for r in range(responses)])

    def phases(self, pair: Pair, plan: Plan, rows: int) -> Values:
        """Centred c0 + f + c1·s modulo q at the wanted coefficients: Python integers [tokens, rows]."""
        tokens, primes = len(self.flood), pair.parameters.primes
        groups = plan.row_groups(rows)
        secret = secret_of(pair)
        places = [
            (
                token // plan.tokens * groups + row // plan.rows,
                reference.wanted(plan, token % plan.tokens, row % plan.rows),
            )
            for token in range(tokens)
            for row in range(rows)
        ]
        responses, at = np.array(places).T
        residues, sums = [], self.sums
        for i, prime in enumerate(primes):
            p, s = np.uint64(prime), reference.transform(secret % prime, prime)
            c0, c1 = sums[:, i, 0].astype(np.uint64), sums[:, i, 1].astype(np.uint64)
            phase = reference.inverse((c0 + c1 % p * s) % p, prime)[responses, at]
            residues.append((phase + self.flood[..., i].reshape(-1)) % p)
        q = pair.parameters.modulus
        whole = [reference.centre(value, q) for value in reference.combine(np.stack(residues), primes)]
        return np.array(whole, dtype=object).reshape(tokens, rows)


def secret_of(pair: Pair) -> Values:
    """The host's secret key, ternary int64 [N]: the attacker is the host."""
    prime = pair.parameters.primes[0]
    coefficients = reference.inverse(pair.host._keys[1][0].astype(np.uint64), prime).astype(np.int64)
    return np.where(coefficients > 1, coefficients - prime, coefficients)


def own_errors(pair: Pair, sent: EncryptedActivations) -> Values:
    """The errors e in the host's ciphertexts of zeros, int64 [C, N]: b + a·s."""
    prime = pair.parameters.primes[0]
    masks = [
        reference.expand(pair.parameters, reference.CIPHERTEXT, SESSION, identifier, sent.seeds[32 * i : 32 * i + 32])
        for i, identifier in enumerate(sent.ids.tolist())
    ]
    s = reference.transform(secret_of(pair) % prime, prime)
    phase = (sent.b[:, 0].astype(np.uint64) + np.stack(masks)[:, 0] * s) % np.uint64(prime)
    errors = reference.inverse(phase, prime).astype(np.int64)
    return np.where(errors > prime // 2, errors - prime, errors)


def ask(pair: Pair, x: Values, weights: GroupWeights, plan: Plan) -> tuple[EncryptedActivations, EvaluatedRows]:
    group = EncodedGroup(weights, pair.parameters, [plan])
    sent = pair.host.encrypt(x, plan, weights.norm_bound)
    return sent, pair.evaluator.evaluate(group, plan, sent.tokens, sent.ids, sent.seeds, sent.b)


def chi_square(first: Values, second: Values, cells: int) -> float:
    """How far two samples of integers below ``cells`` are from one distribution, in standard deviations.

    Two-sample chi-square statistic, made Gaussian by the cube root of Wilson and Hilferty (PNAS 17, 1931).
    """
    counts = np.stack([np.bincount(np.ravel(sample).astype(np.int64), minlength=cells) for sample in (first, second)])
    counts = counts[:, counts.sum(axis=0) > 0].astype(np.float64)
    degrees = counts.shape[1] - 1
    if degrees == 0:
        return 0.0
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    centre, spread = 1.0 - 2.0 / (9.0 * degrees), (2.0 / (9.0 * degrees)) ** 0.5
    return ((statistic / degrees) ** (1.0 / 3.0) - centre) / spread
