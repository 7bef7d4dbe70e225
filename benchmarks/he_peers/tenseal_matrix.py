"""TenSEAL's own product of an encrypted vector with a plaintext matrix (`CKKSVector.mm`), one token after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import tenseal

from he_peers.case import Case, Matrix, Skipped

DEGREE = 8192
MODULI = [60, 40, 60]


class TensealMatrix:
    """As its tutorial does it: degree 8192, primes of 60, 40 and 60 bits, a key for every power-of-two rotation."""

    function_private = False
    steady = False
    note = f"N = {DEGREE}, q of {sum(MODULI)} bits"
    key_bytes = evaluation_key_bytes = 0

    def measured_channels(self, d: int) -> int:
        return d

    def batches(self, d: int, tokens: int) -> int:
        return tokens

    def prepare(self, weights: Matrix, case: Case) -> None:
        if case.d > DEGREE // 2:
            raise Skipped(f"mm takes vectors of up to {DEGREE // 2} entries at N = {DEGREE}")
        self.context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=MODULI, n_threads=1)
        self.context.global_scale = 2.0**40
        self.context.generate_galois_keys()
        with_keys, without = (
            len(self.context.serialize(save_public_key=False, save_galois_keys=keys, save_relin_keys=False))
            for keys in (True, False)
        )
        self.evaluation_key_bytes = self.key_bytes = with_keys - without
        self.matrix = weights.T.tolist()

    def refill(self) -> None:
        return

    def encrypt(self, x: Matrix) -> list[Any]:
        return [tenseal.ckks_vector(self.context, token.tolist()) for token in x]

    def evaluate(self, request: list[Any]) -> list[Any]:
        return [vector.mm(self.matrix) for vector in request]

    def decrypt(self, request: list[Any], response: list[Any]) -> Matrix:
        return np.array([vector.decrypt() for vector in response])

    def sizes(self, request: list[Any], response: list[Any]) -> tuple[int, int]:
        up, down = (sum(len(vector.serialize()) for vector in message) for message in (request, response))
        return up, down
