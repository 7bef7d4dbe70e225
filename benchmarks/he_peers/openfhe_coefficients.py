"""OpenFHE with TenSafe's coefficient encoding and plan, but one 60-bit prime and no function privacy.

Whoever holds the key can divide the returned c1 by the sent one and has the weights: this row shows what the bare
products cost in OpenFHE, not something to deploy. A polynomial m is encoded as its N/2 complex values at the
5^j-th powers of a primitive 2N-th root of unity, because OpenFHE's CKKS takes slots only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from he_peers.case import Case, Matrix
from he_peers.openfhe_ring import Complex, Ring, RingKind

KIND = RingKind(4096, data_bits=29)


class CoefficientEncoding:
    """Real polynomials [N] to slots and back."""

    def __init__(self, degree: int) -> None:
        self._twist = np.exp(1j * np.pi * np.arange(degree) / degree)
        powers = np.array([pow(5, j, 2 * degree) for j in range(degree // 2)])
        self._places = (powers - 1) // 2
        self._conjugates = degree - 1 - self._places
        self._degree = degree

    def to_slots(self, polynomial: Matrix) -> Complex:
        values = np.fft.ifft(polynomial * self._twist, norm="forward")
        return np.ascontiguousarray(values[self._places])

    def from_slots(self, slots: Complex) -> Matrix:
        values = np.empty(self._degree, np.complex128)
        values[self._places], values[self._conjugates] = slots, slots.conj()
        return (np.fft.fft(values, norm="forward") / self._twist).real


class CoefficientPacked:
    """Plan (T', d', r'): token t, channel i at coefficient T'·i + t; row j, channel i at T'·(j·d' + d' - 1 - i)."""

    function_private = False
    steady = False
    note = f"N = {KIND.degree}, q of 60 bits; the same plan as tensafe-cpu"
    key_bytes = evaluation_key_bytes = 0

    def measured_channels(self, d: int) -> int:
        return d

    def batches(self, d: int, tokens: int) -> int:
        return tokens

    def prepare(self, weights: Matrix, case: Case) -> None:
        self.plan = plan_tokens, channels, plan_rows = case.plan
        if plan_tokens * channels * plan_rows > KIND.degree:
            raise ValueError(f"the plan {case.plan} does not fit degree {KIND.degree}")
        self.ring, self.encoding = Ring(KIND, []), CoefficientEncoding(KIND.degree)
        self.rows, self.tokens = case.rows, case.tokens
        self.blocks, self.row_groups = -(-case.d // channels), -(-case.rows // plan_rows)
        padded = np.zeros((self.row_groups * plan_rows, self.blocks * channels))
        padded[: case.rows, : case.d] = weights
        tiles = padded.reshape(self.row_groups, plan_rows, self.blocks, channels)[..., ::-1]
        self.encoded = []
        for group in tiles:
            polynomials = np.zeros((self.blocks, KIND.degree))
            used = polynomials[:, : plan_tokens * channels * plan_rows : plan_tokens]
            used[:] = group.transpose(1, 0, 2).reshape(self.blocks, -1)
            self.encoded.append([self.ring.weights(self.encoding.to_slots(p)) for p in polynomials])

    def refill(self) -> None:
        return

    def encrypt(self, x: Matrix) -> list[list[Any]]:
        """Ciphertexts [chunk of tokens][block of channels]."""
        plan_tokens, channels, _ = self.plan
        chunks = -(-self.tokens // plan_tokens)
        padded = np.zeros((chunks * plan_tokens, self.blocks * channels))
        padded[: self.tokens, : x.shape[1]] = x
        tiles = padded.reshape(chunks, plan_tokens, self.blocks, channels)
        polynomials = np.zeros((chunks, self.blocks, KIND.degree))
        polynomials[..., : channels * plan_tokens] = tiles.transpose(0, 2, 3, 1).reshape(chunks, self.blocks, -1)
        return [[self.ring.encrypt(self.encoding.to_slots(p)) for p in chunk] for chunk in polynomials]

    def evaluate(self, request: list[list[Any]]) -> list[list[Any]]:
        return [[self.ring.sum_of_products(blocks, group) for group in self.encoded] for blocks in request]

    def decrypt(self, request: list[list[Any]], response: list[list[Any]]) -> Matrix:
        plan_tokens, channels, plan_rows = self.plan
        z = np.empty((len(response), plan_tokens, self.row_groups, plan_rows))
        places = plan_tokens * (channels * np.arange(1, plan_rows + 1) - 1)
        for chunk, groups in enumerate(response):
            for group, ciphertext in enumerate(groups):
                polynomial = self.encoding.from_slots(self.ring.decrypt(ciphertext))
                z[chunk, :, group] = polynomial[places + np.arange(plan_tokens)[:, None]]
        return z.reshape(len(response) * plan_tokens, -1)[: self.tokens, : self.rows]

    def sizes(self, request: list[list[Any]], response: list[list[Any]]) -> tuple[int, int]:
        up, down = (sum(map(len, message)) for message in (request, response))
        return up * self.ring.size(request[0][0]), down * self.ring.size(response[0][0])
