"""OpenFHE with tokens in slots: one ciphertext per input channel, times scalars (MOAI's column packing).

One slot takes one token, so that a few thousand tokens cost what one costs. No rotation, as in TenSafe; every channel
travels as a ciphertext of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from he_peers.case import Case, Matrix
from he_peers.openfhe_ring import Ring, RingKind

KIND = RingKind(4096, data_bits=30)
MEASURED_CHANNELS = 128


class ColumnPacked:
    """z_row = Σ_channel A[row, channel] · ciphertext(channel)."""

    function_private = False
    steady = False
    note = f"{KIND.name}; up to {KIND.degree // 2} tokens for this price"
    key_bytes = evaluation_key_bytes = 0

    def measured_channels(self, d: int) -> int:
        return min(d, MEASURED_CHANNELS)

    def batches(self, d: int, tokens: int) -> int:
        return -(-tokens // (KIND.degree // 2))

    def prepare(self, weights: Matrix, case: Case) -> None:
        self.ring = Ring(KIND, [])
        self.scalars = (weights * self.ring.weight_factor).tolist()
        self.tokens = case.tokens

    def refill(self) -> None:
        return

    def encrypt(self, x: Matrix) -> list[Any]:
        slots = np.zeros((x.shape[1], self.ring.slots), np.complex128)
        slots[:, : self.tokens] = x.T
        return [self.ring.encrypt(channel) for channel in slots]

    def evaluate(self, request: list[Any]) -> list[Any]:
        multiply, add = self.ring.context.EvalMult, self.ring.context.EvalAddInPlace
        response = []
        for row in self.scalars:
            total = multiply(request[0], row[0])
            for ciphertext, scalar in zip(request[1:], row[1:], strict=True):
                add(total, multiply(ciphertext, scalar))
            response.append(total)
        return response

    def decrypt(self, request: list[Any], response: list[Any]) -> Matrix:
        return np.array([self.ring.decrypt(row).real[: self.tokens] for row in response]).T

    def sizes(self, request: list[Any], response: list[Any]) -> tuple[int, int]:
        return len(request) * self.ring.size(request[0]), len(response) * self.ring.size(response[0])
