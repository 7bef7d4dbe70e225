"""OpenFHE with slot packing and rotations: rotate-and-sum, and baby-step giant-step with hoisting.

Packing. One slot takes two channels, as real and imaginary part; the weights are conjugated so that the real part of
a product is the sum of both (the imaginary part says something more about A). Channels of several tokens lie
interleaved: a rotation by k·tokens moves every token by k channels and wraps around within it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from he_peers.case import Case, Matrix
from he_peers.openfhe_ring import Complex, Ring, RingKind

# Data bits such that noise of key switching and rounding of the weights are of one size: together 2^-12 with BV and
# digits of 10 bits, TenSafe's own bound on random input. Smaller digits are slower, larger ones miss it.
SMALL = RingKind(4096, data_bits=34)
LARGE = RingKind(8192, data_bits=29, hybrid=True)


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class SlotPacked:
    """Packing and sizes of both methods."""

    function_private = False
    steady = False
    key_bytes = evaluation_key_bytes = 0
    ring: Ring

    def __init__(self, kind: RingKind) -> None:
        self.kind = kind
        self.note = kind.name
        self.slots = kind.degree // 2

    def measured_channels(self, d: int) -> int:
        return d

    def refill(self) -> None:
        return

    def _period(self, d: int, rows: int = 1) -> int:
        """Slots of one token in one ciphertext."""
        return min(max(power_of_two(-(-d // 2)), power_of_two(rows)), self.slots)

    def batches(self, d: int, tokens: int) -> int:
        return -(-tokens // (self.slots // self._period(d)))

    def _pack(self, values: Matrix) -> Complex:
        """[count, d] to complex [count, parts, period]."""
        count, d = values.shape
        padded = np.zeros((count, self.parts, 2, self.period))
        padded.reshape(count, -1)[:, :d] = values
        return padded[:, :, 0] + 1j * padded[:, :, 1]

    def _layout(self, case: Case) -> None:
        self.rows, self.tokens = case.rows, case.tokens
        self.period = self._period(case.d, case.rows)
        self.parts = -(-case.d // (2 * self.period))
        self.together = self.slots // self.period

    def _spread(self, values: Complex) -> Any:
        """A plaintext with the same weights, complex [period], for every token."""
        return self.ring.weights(np.repeat(values, self.together))

    def encrypt(self, x: Matrix) -> list[list[Any]]:
        """Ciphertexts [batch][part]."""
        request = []
        for first in range(0, len(x), self.together):
            packed = self._pack(x[first : first + self.together])
            slots = np.zeros((self.parts, self.period, self.together), np.complex128)
            slots[:, :, : len(packed)] = packed.transpose(1, 2, 0)
            request.append([self.ring.encrypt(part.reshape(-1)) for part in slots])
        return request

    def sizes(self, request: list[list[Any]], response: list[list[Any]]) -> tuple[int, int]:
        up, down = (sum(map(len, message)) for message in (request, response))
        return up * self.ring.size(request[0][0]), down * self.ring.size(response[0][0])

    def _ring_with(self, rotations: list[int]) -> None:
        self.ring = Ring(self.kind, [self.together * index for index in rotations])
        self.key_bytes = self.evaluation_key_bytes = self.ring.key_bytes

    def _rotated(self, ciphertext: Any, index: int) -> Any:
        return self.ring.context.EvalRotate(ciphertext, self.together * index)


class RotateAndSum(SlotPacked):
    """One product per row, whose slots are then summed by log2(period) rotations. A ciphertext returns per row."""

    def prepare(self, weights: Matrix, case: Case) -> None:
        self._layout(case)
        self.steps = [1 << i for i in range(self.period.bit_length() - 1)]
        self._ring_with(self.steps)
        self.encoded = [[self._spread(part) for part in row] for row in self._pack(weights).conj()]

    def evaluate(self, request: list[list[Any]]) -> list[list[Any]]:
        add = self.ring.context.EvalAddInPlace
        response = []
        for parts in request:
            sums = []
            for row in self.encoded:
                total = self.ring.sum_of_products(parts, row)
                for step in self.steps:
                    add(total, self._rotated(total, step))
                sums.append(total)
            response.append(sums)
        return response

    def decrypt(self, request: list[list[Any]], response: list[list[Any]]) -> Matrix:
        columns = [[self.ring.decrypt(row).real[: self.together] for row in rows] for rows in response]
        return np.concatenate([np.array(rows).T for rows in columns])[: self.tokens]


class BabyStepGiantStep(SlotPacked):
    """Rows (a power of two of them) as diagonals that wrap around the rows, after Halevi and Shoup, "Faster homomorphic
    linear transformations in HElib" (eprint 2018/244): diagonal k = g·a + j is Σ_a rot_ga(Σ_j diagonal · rot_j(x)),
    with the baby rotations rot_j hoisted; then the period is folded onto the rows. The number g of baby steps and
    whether to fold by two or by four (hoisted) follow from what rotations cost here.
    """

    def prepare(self, weights: Matrix, case: Case) -> None:
        self._layout(case)
        self.diagonals = power_of_two(case.rows)
        self.babies, self.radix = self._choose()
        self.note = f"{self.kind.name}; {self.babies} baby steps, folded by {self.radix}"
        self.folds = self._fold_steps(self.radix)
        giants = range(self.babies, self.diagonals, self.babies)
        self._ring_with(sorted({*range(1, self.babies), *giants, *itertools.chain(*self.folds)}))
        packed = np.zeros((self.diagonals, self.parts, self.period), np.complex128)
        packed[: case.rows] = self._pack(weights).conj()
        # encoded[a][j·parts + part]
        self.encoded = [
            [
                self._spread(np.roll(self._diagonal(packed[:, part], giant + baby), giant))
                for baby in range(self.babies)
                for part in range(self.parts)
            ]
            for giant in (0, *giants)
        ]

    def _diagonal(self, packed: Complex, index: int) -> Complex:
        places = np.arange(self.period)
        return packed[places % self.diagonals, (places + index) % self.period]

    def _fold_steps(self, radix: int) -> list[list[int]]:
        """Each step adds these rotations of the sum to it, and so reduces the period by their number plus one."""
        steps, period = [], self.diagonals
        while period < self.period:
            width = min(radix, self.period // period)
            steps.append([period * i for i in range(1, width)])
            period *= width
        return steps

    def _choose(self) -> tuple[int, int]:
        self._ring_with([1])
        ring, context = self.ring, self.ring.context
        ciphertext = ring.encrypt(np.zeros(self.slots, np.complex128))
        digits = context.EvalFastRotationPrecompute(ciphertext)
        rotate = cost(lambda: self._rotated(ciphertext, 1))
        prepare = cost(lambda: context.EvalFastRotationPrecompute(ciphertext))
        hoisted = cost(lambda: self._hoisted(ciphertext, 1, digits))

        def time_of(babies: int, radix: int) -> float:
            folds = [rotate if len(s) == 1 else prepare + len(s) * hoisted for s in self._fold_steps(radix)]
            first = self.parts * (prepare + (babies - 1) * hoisted)
            return first + (self.diagonals // babies - 1) * rotate + sum(folds)

        babies = [1 << i for i in range(self.diagonals.bit_length())]
        return min(itertools.product(babies, (2, 4)), key=lambda choice: time_of(*choice))

    def _hoisted(self, ciphertext: Any, index: int, digits: Any) -> Any:
        return self.ring.context.EvalFastRotation(ciphertext, self.together * index, 2 * self.kind.degree, digits)

    def evaluate(self, request: list[list[Any]]) -> list[list[Any]]:
        return [[self._product(parts)] for parts in request]

    def _product(self, parts: list[Any]) -> Any:
        context = self.ring.context
        digits = [context.EvalFastRotationPrecompute(part) for part in parts]
        moved = list(parts)
        for baby in range(1, self.babies):
            moved += [self._hoisted(part, baby, own) for part, own in zip(parts, digits, strict=True)]
        total = self.ring.sum_of_products(moved, self.encoded[0])
        for number, plaintexts in enumerate(self.encoded[1:], 1):
            partial = self.ring.sum_of_products(moved, plaintexts)
            context.EvalAddInPlace(total, self._rotated(partial, self.babies * number))
        for steps in self.folds:
            if len(steps) == 1:
                others = [self._rotated(total, steps[0])]
            else:
                own = context.EvalFastRotationPrecompute(total)
                others = [self._hoisted(total, step, own) for step in steps]
            for other in others:
                context.EvalAddInPlace(total, other)
        return total

    def decrypt(self, request: list[list[Any]], response: list[list[Any]]) -> Matrix:
        columns = [self.ring.decrypt(sums).real.reshape(self.period, self.together) for (sums,) in response]
        return np.concatenate([column[: self.rows].T for column in columns])[: self.tokens]


def cost(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median seconds of CPU time."""
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return statistics.median(spent)
