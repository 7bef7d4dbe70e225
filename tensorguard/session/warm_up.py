"""Compile the kernels before the first request waits for it, for the types they get behind frames."""

from __future__ import annotations

import os

import numpy as np

from tensorguard.ckks.evaluator import Evaluator
from tensorguard.ckks.host import HostSession
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.packing import pack, unpack_bytes
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.weights import EncodedGroup, GroupWeights
from tensorguard.session import frames
from tensorguard.session.transcript import SESSION_ID_BYTES

_POOL_BYTES = 1 << 20


def warm_up() -> None:
    """Two tiny products of zeros, without pools and with them, through the frames, all in this process, with keys that
    are thrown away.

    The first time on a machine takes some seconds; later numba's cache has the kernels.
    """
    parameters, plan = get_parameter_set(DEFAULT_PARAMETER_SET), Plan(1, 32, 1)
    group = EncodedGroup(GroupWeights(np.zeros((1, 1), np.int32), (0,), 1.0), parameters, [plan])
    seed, session_id = os.urandom(32), os.urandom(SESSION_ID_BYTES)
    host = HostSession.create(parameters, seed, session_id, pool_bytes=_POOL_BYTES)
    public_key = unpack_bytes(pack(host.public_key).tobytes(), host.public_key.shape)
    evaluator = Evaluator(parameters, public_key, seed, session_id, pool_bytes=_POOL_BYTES)
    for request_id in (1, 2):
        encrypted = host.encrypt(np.zeros((1, 1)), plan, 1.0)
        sent = frames.EvaluationRequest(
            *(request_id, 0, 0, "qkv", plan, 1, 0), ids=encrypted.ids, seeds=encrypted.seeds, b=encrypted.b
        )
        request = frames.read_request(frames.write_request(sent), parameters)
        rows = evaluator.evaluate(group, plan, 1, request.ids, request.seeds, request.b)
        answer = frames.EvaluationResponse(request_id, rows.c1, rows.c0, 0, frames.OperationCounts())
        response = frames.read_response(frames.write_response(answer), parameters)
        assert isinstance(response, frames.EvaluationResponse)
        host.decrypt(encrypted, EvaluatedRows(c1=response.c1, c0=response.c0), 1, np.ones(1))
        host.pool.fill()
        evaluator.pool.fill()
    evaluator.pool.close()
    host.close()
