"""What `warm_up` leaves for the first request to compile: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# In a process of its own: here other tests have compiled everything long ago.
CODE = """
import os
import sys

import numpy as np
from numba.core.dispatcher import Dispatcher

from tensorguard.ckks import EncodedGroup, EvaluatedRows, Evaluator, GroupWeights, HostSession, Plan, get_parameter_set
from tensorguard.ckks.packing import pack, unpack_bytes
from tensorguard.session import frames
from tensorguard.session.shared_memory import SharedRegion
from tensorguard.session.warm_up import warm_up


def compiled():
    modules = [module for name, module in sys.modules.items() if name.startswith("tensorguard.")]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    return {(kernel.py_func.__qualname__, str(signature)) for kernel in kernels for signature in kernel.signatures}


def serve(parameter_set, tokens, dtype, slot, **options):
    parameters, plan = get_parameter_set(parameter_set), Plan(2, 32, 4)
    weights = np.ones((6, 40), np.int32)
    group = EncodedGroup(GroupWeights(weights, (0,) * 6, 100.0), parameters, [plan])
    host = HostSession.create(parameters, bytes(32), b"session", **options)
    key = unpack_bytes(pack(host.public_key).tobytes(), host.public_key.shape)
    evaluator = Evaluator(parameters, key, bytes(32), b"session", threads=2, **options)
    for checked in (False, True):
        host.pool.fill()
        evaluator.pool.fill()
        sent = host.encrypt(np.ones((tokens, 40), dtype), plan, 100.0, checked=checked)
        request = frames.EvaluationRequest(
            1, 0, 0, "qkv", plan, sent.tokens, 0, ids=sent.ids, seeds=sent.seeds, b=sent.b, slot=slot
        )
        got = frames.read_request(frames.write_request(request), parameters, slot and slot.region)
        rows = evaluator.evaluate(group, plan, sent.tokens, got.ids, got.seeds, got.b)
        answer = frames.EvaluationResponse(1, rows.c1, rows.c0, 0, frames.OperationCounts())
        response = frames.read_response(frames.write_response(answer, slot), parameters, slot)
        host.decrypt(sent, EvaluatedRows(c1=response.c1, c0=response.c0), 6, np.ones(6))


warm_up()
before = compiled()
assert before
descriptor = os.memfd_create("slots")
os.ftruncate(descriptor, 1 << 20)
slot = SharedRegion(descriptor, 1 << 20).slot(0, 1 << 20)
serve("n4096-q90-w12", 1, np.float32, None)
serve("n4096-q90-w12", 5, np.float64, slot, pool_bytes=1 << 20)
serve("n8192-q150-w12", 3, np.float64, None, pool_bytes=1 << 20)
print(sorted(compiled() - before))
"""


def test_nothing_is_left_to_compile() -> None:
    """Both transports, rings, one and several tokens and threads, checked mode, with pools and without."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
