"""The frame decoder: requests as the coprocessor reads them, responses as the host reads them."""

from __future__ import annotations

import numpy as np

from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.target import Target
from tensorguard.ckks.parameters import PARAMETER_SETS, ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.errors import InvalidInputError
from tensorguard.session import frames

FACTOR, ALLOWANCE = 4, 256 * 1024


def frames_target() -> Target:
    """One parameter set for each shape of polynomials; the first byte of an input chooses it."""
    shapes = {(p.degree, len(p.primes)): p for p in reversed(list(PARAMETER_SETS.values()))}
    parameter_sets = list(shapes.values())
    messages = [_messages(parameters) for parameters in parameter_sets]
    for parameters, known in zip(parameter_sets, messages, strict=True):
        for message in known:
            _check(message, parameters)  # compiles what there is to compile, which takes memory

    def run(data: bytes) -> None:
        if not data:
            return
        chosen = data[0] % len(parameter_sets)
        message = message_from(data[1:], messages[chosen])
        with bounded_memory(len(message), FACTOR, ALLOWANCE):
            _check(message, parameter_sets[chosen])

    seeds = [bytes([i, j]) for i in range(len(parameter_sets)) for j in range(len(messages[i]) + 1)]
    return Target("frames", seeds, run)


def _check(message: bytes, parameters: ParameterSet) -> None:
    frames.request_id_of(message)
    try:
        request = frames.read_request(message, parameters)
    except InvalidInputError:
        pass
    else:
        assert len(request.ids) == len(request.b) == len(request.seeds) // frames.SEED_BYTES >= 1
        assert request.b.shape[1:] == (len(parameters.primes), parameters.degree)
        again = frames.read_request(frames.write_request(request), parameters)
        assert np.array_equal(again.b, request.b) and np.array_equal(again.ids, request.ids)
        assert (again.request_id, again.plan, again.tokens) == (request.request_id, request.plan, request.tokens)
        assert frames.request_id_of(message) == request.request_id
    try:
        response = frames.read_response(message, parameters)
    except InvalidInputError:
        return
    if isinstance(response, frames.EvaluationFailure):
        assert frames.read_response(frames.write_failure(response.request_id, response.code), parameters) == response
        return
    assert response.c1.shape[1:] == (parameters.degree,) and response.c0.ndim == 2
    repeated = frames.read_response(frames.write_response(response), parameters)
    assert isinstance(repeated, frames.EvaluationResponse) and repeated.counts == response.counts
    assert np.array_equal(repeated.c1, response.c1) and np.array_equal(repeated.c0, response.c0)


def _messages(parameters: ParameterSet) -> list[bytes]:
    generator = np.random.default_rng(parameters.degree)

    def residues(*shape: int) -> np.ndarray:
        return generator.integers(0, 2**29, shape, dtype=np.uint32)

    def request(count: int, plan: Plan, tokens: int) -> bytes:
        return frames.write_request(
            frames.EvaluationRequest(
                request_id=7,
                adapter_handle=0,
                layer=1,
                group="gate_up",
                plan=plan,
                tokens=tokens,
                key_number=0,
                ids=np.arange(1, count + 1, dtype=np.uint64),
                seeds=generator.bytes(frames.SEED_BYTES * count),
                b=residues(count, len(parameters.primes), parameters.degree),
            )
        )

    def response(responses: int, tokens: int, rows: int) -> bytes:
        return frames.write_response(
            frames.EvaluationResponse(
                request_id=7,
                c1=residues(responses, parameters.degree),
                c0=residues(tokens, rows),
                evaluate_ns=5,
                counts=frames.OperationCounts(1, 2, 3, 4, 5),
            )
        )

    return [
        request(1, Plan(1, 64, 8), 1),
        request(2, Plan(8, 64, 8), 5),
        response(1, 1, 1),
        response(2, 5, 48),
        frames.write_failure(7),
    ]
