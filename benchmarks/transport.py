"""Round trip of one evaluation frame between two processes, without the arithmetic: inline and in shared memory.

    python benchmarks/transport.py [--json FILE] [--calls N]

What is timed is what a session does to send a request and receive its response: packing, writing, gRPC over loopback,
reading and unpacking on both sides. The other process answers with an array that is there already. Rounds alternate
between the transports; figures are medians (and 90th percentiles) of single calls, one in flight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tensorguard.ckks import DEFAULT_PARAMETER_SET, Plan, get_parameter_set
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.options import DEFAULT_MESSAGE_BYTES, server_options
from tensorguard.session import frames
from tensorguard.session.shared_memory import SharedRegion, Slot, offer_region, open_offered_region
from tensorguard.session.stream import EVALUATE, SESSION_KEY, EvaluationStream

PARAMETERS = get_parameter_set(DEFAULT_PARAMETER_SET)
REGION_BYTES = 16 << 20
ROWS = 48
# Ciphertexts up, responses down: one token at d = 576, one at d = 4096, and a frame of a long prompt.
SHAPES = ((1, 1), (8, 2), (22, 22))
ROUNDS = 8
SHARED, INLINE = b"shared", b"inline"


def residues(*shape: int) -> Any:
    """Statistical generator: test data, not a secret."""
    return np.random.default_rng(0).integers(0, PARAMETERS.primes[-1], (*shape, PARAMETERS.degree), dtype=np.uint32)


def serve(name: str) -> None:
    """The other process: prints its port, and answers until its input ends."""
    region, _ = open_offered_region(name, REGION_BYTES, REGION_BYTES)
    downs = {up: (residues(down), residues(1)[:, :ROWS].copy()) for up, down in SHAPES}

    def evaluate(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        memory = region if metadata[SESSION_KEY] == SHARED else None
        for message in messages:
            request = frames.read_request(message, PARAMETERS, memory)
            c1, c0 = downs[len(request.ids)]
            response = frames.EvaluationResponse(request.request_id, c1, c0, 0, frames.OperationCounts())
            yield frames.write_response(response, request.slot)

    server = grpc.server(ThreadPoolExecutor(4), options=server_options(DEFAULT_MESSAGE_BYTES))
    service, method = EVALUATE.strip("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(evaluate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0)


class Caller:
    """This process' end of one stream."""

    def __init__(self, port: int, memory: SharedRegion | None) -> None:
        channel = open_channel(f"127.0.0.1:{port}", wait_ready_seconds=10)
        self.stream = EvaluationStream(channel, SHARED if memory else INLINE, PARAMETERS, memory)
        self.stream.start(lambda cause: print(f"broken: {cause}", file=sys.stderr))

    def call(self, b: Any, up: int, down: int) -> float:
        """Seconds from the residues to the response's residues."""
        sizes = frames.request_bytes(up, PARAMETERS), frames.response_bytes(down, 1, ROWS, PARAMETERS)

        def build(request_id: int, slot: Slot | None) -> bytes:
            ids = np.arange(up, dtype=np.uint64)
            request = frames.EvaluationRequest(
                *(request_id, 0, 0, "qkv", Plan(1, 256, 12), 1, 0), ids=ids, seeds=bytes(32 * up), b=b, slot=slot
            )
            return frames.write_request(request)

        started = time.perf_counter()
        response = self.stream.submit(build, max(sizes)).result(10.0)
        elapsed = time.perf_counter() - started
        assert response is not None and len(response.c1) == down
        return elapsed


def measure(port: int, memory: SharedRegion, calls: int) -> list[dict[str, Any]]:
    callers = {"inline": Caller(port, None), "shared_memory": Caller(port, memory)}
    records = []
    for up, down in SHAPES:
        b = residues(up, len(PARAMETERS.primes))
        times: dict[str, list[float]] = {name: [] for name in callers}
        for number in range(ROUNDS + 1):
            for name, caller in callers.items():
                spent = [caller.call(b, up, down) for _ in range(calls // ROUNDS)]
                times[name] += spent if number else []  # the first round warms up
        for name, spent in times.items():
            records.append(
                {
                    "transport": name,
                    "bytes_up": frames.request_bytes(up, PARAMETERS),
                    "bytes_down": frames.response_bytes(down, 1, ROWS, PARAMETERS),
                    "median_us": 1e6 * statistics.median(spent),
                    "p90_us": 1e6 * statistics.quantiles(spent, n=10)[-1],
                    "calls": len(spent),
                }
            )
    for caller in callers.values():
        caller.stream.close()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--calls", type=int, default=2000, help="per size and transport")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    offered = offer_region(REGION_BYTES)
    command = [sys.executable, __file__, "--serve", offered.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            port = int(other.stdout.readline())
            offered.withdraw()
            records = measure(port, offered.region, options.calls)
        finally:
            offered.withdraw()
            other.stdin.close()
    print(f"{'up KB':>8}{'down KB':>9}  {'transport':<14}{'median us':>11}{'p90 us':>9}   {os.cpu_count()} cores")
    for r in records:
        sizes = f"{r['bytes_up'] / 1000:>8.0f}{r['bytes_down'] / 1000:>9.0f}"
        print(f"{sizes}  {r['transport']:<14}{r['median_us']:>11.0f}{r['p90_us']:>9.0f}")
    if options.json:
        options.json.write_text(json.dumps({"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
