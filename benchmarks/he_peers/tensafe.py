"""TenSafe's own engine, both sides in this process, with frames as they travel."""

from __future__ import annotations

import os

import numpy as np

from he_peers.case import Case, Matrix
from tensorguard.ckks import (
    DEFAULT_PARAMETER_SET,
    EncodedGroup,
    EncryptedActivations,
    EvaluatedRows,
    Evaluator,
    GroupWeights,
    HostSession,
    Plan,
    compile_kernels,
    get_parameter_set,
)
from tensorguard.session import frames

SESSION = b"he_core benchmark"
RANK = 16


class TensafeCpu:
    """Every run makes its encryptions of zero and expands its seeds."""

    function_private = True
    steady = True
    note = ""
    evaluation_key_bytes = 0

    def __init__(self) -> None:
        compile_kernels()
        self.parameters = get_parameter_set(DEFAULT_PARAMETER_SET)
        seed = os.urandom(32)
        self.host = HostSession.create(self.parameters, seed, SESSION)
        self.evaluator = Evaluator(self.parameters, self.host.public_key, seed, SESSION)
        self.key_bytes = self.host.public_key.nbytes + len(seed)

    def measured_channels(self, d: int) -> int:
        return d

    def batches(self, d: int, tokens: int) -> int:
        return tokens

    def prepare(self, weights: Matrix, case: Case) -> None:
        self.plan = Plan(*case.plan)
        self.tokens = case.tokens
        self.weights = rounded(weights, self.parameters.norm_bound(case.d, min(case.rows, RANK)))
        self.group = EncodedGroup(self.weights, self.parameters, [self.plan])
        self.note = f"{self.parameters.name}, plan {self.plan.identifier}"

    def refill(self) -> None:
        return

    def encrypt(self, x: Matrix) -> EncryptedActivations:
        return self.host.encrypt(x, self.plan, self.weights.norm_bound)

    def evaluate(self, request: EncryptedActivations) -> EvaluatedRows:
        return self.evaluator.evaluate(self.group, self.plan, self.tokens, request.ids, request.seeds, request.b)

    def decrypt(self, request: EncryptedActivations, response: EvaluatedRows) -> Matrix:
        return self.host.decrypt(request, response, self.weights.rows, self.weights.row_scales)

    def sizes(self, request: EncryptedActivations, response: EvaluatedRows) -> tuple[int, int]:
        up = frames.EvaluationRequest(
            request_id=1,
            adapter_handle=0,
            layer=0,
            group="qkv",
            plan=self.plan,
            tokens=self.tokens,
            key_number=0,
            ids=request.ids,
            seeds=request.seeds,
            b=request.b,
        )
        down = frames.EvaluationResponse(
            request_id=1, c1=response.c1, c0=response.c0, evaluate_ns=0, counts=frames.OperationCounts()
        )
        return len(frames.write_request(up)), len(frames.write_response(down))


def rounded(weights: Matrix, norm_bound: float) -> GroupWeights:
    """Projections of RANK rows, each with the largest power-of-two scale that its norm allows, as packing does it."""
    integers, exponents = np.empty(weights.shape, np.int32), []
    for first in range(0, len(weights), RANK):
        projection = weights[first : first + RANK]
        exponent = int(np.floor(np.log2(0.999 * norm_bound / np.linalg.norm(projection))))
        integers[first : first + RANK] = np.rint(np.ldexp(projection, exponent))
        exponents += [exponent] * len(projection)
    return GroupWeights(integers, tuple(exponents), norm_bound)
