"""TenSafe's engines, both sides in this process, with frames as they travel."""

from __future__ import annotations

import os
from typing import Any

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
    get_parameter_set,
)
from tensorguard.session import frames
from tensorguard.session.warm_up import warm_up

SESSION = b"he_core benchmark"
RANK = 16
POOL_BYTES = 256 * 1024 * 1024


class TensafeCpu:
    """Every run makes its encryptions of zero and expands its seeds."""

    function_private = True
    steady = True
    note = ""
    evaluation_key_bytes = 0

    def __init__(self) -> None:
        warm_up()
        self.parameters = get_parameter_set(DEFAULT_PARAMETER_SET)
        seed = os.urandom(32)
        self.host = self._make_host(seed)
        self.evaluator = self._make_evaluator(seed)
        self.key_bytes = self.host.public_key.nbytes + len(seed)

    def _make_host(self, seed: bytes) -> HostSession:
        return HostSession.create(self.parameters, seed, SESSION)

    def _make_evaluator(self, seed: bytes) -> Any:
        return Evaluator(self.parameters, self.host.public_key, seed, SESSION)

    def _encode(self) -> Any:
        return EncodedGroup(self.weights, self.parameters, [self.plan])

    def measured_channels(self, d: int) -> int:
        return d

    def batches(self, d: int, tokens: int) -> int:
        return tokens

    def prepare(self, weights: Matrix, case: Case) -> None:
        self.plan = Plan(*case.plan)
        self.tokens = case.tokens
        self.weights = rounded(weights, self.parameters.norm_bound(case.d, min(case.rows, RANK)))
        self.group = self._encode()
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


class TensafeCpuPools(TensafeCpu):
    """Encryptions of zero are in pools on both sides before a product starts. Making them is not timed."""

    def _make_host(self, seed: bytes) -> HostSession:
        return HostSession.create(self.parameters, seed, SESSION, pool_bytes=POOL_BYTES)

    def _make_evaluator(self, seed: bytes) -> Any:
        return Evaluator(self.parameters, self.host.public_key, seed, SESSION, pool_bytes=POOL_BYTES)

    def refill(self) -> None:
        uploads = self.plan.uploads(self.tokens, self.weights.d_in)
        downloads = self.plan.downloads(self.tokens, self.weights.rows)
        for pool, needed in ((self.host.pool, uploads), (self.evaluator.pool, downloads)):
            while len(pool) < needed:
                if not pool.fill():
                    raise RuntimeError(f"{pool} has no room for the {needed} encryptions of zero that a product takes")


class TensafeOpenfhe(TensafeCpu):
    """The same host; the coprocessor computes with OpenFHE, encryptions of zero and flooding included."""

    steady = False

    def __init__(self) -> None:
        from tensorguard.engines import load_engine

        self._engine = load_engine("openfhe")
        super().__init__()

    def _make_evaluator(self, seed: bytes) -> Any:
        return self._engine.evaluator(self.parameters, self.host.public_key, seed, SESSION)

    def _encode(self) -> Any:
        return self._engine.encode(self.weights, self.parameters, [self.plan])


def rounded(weights: Matrix, norm_bound: float) -> GroupWeights:
    """Projections of RANK rows, each with the largest power-of-two scale that its norm allows, as packing does it."""
    integers, exponents = np.empty(weights.shape, np.int32), []
    for first in range(0, len(weights), RANK):
        projection = weights[first : first + RANK]
        exponent = int(np.floor(np.log2(0.999 * norm_bound / np.linalg.norm(projection))))
        integers[first : first + RANK] = np.rint(np.ldexp(projection, exponent))
        exponents += [exponent] * len(projection)
    return GroupWeights(integers, tuple(exponents), norm_bound)
