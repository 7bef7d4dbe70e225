"""A peer that answers nothing is given up soon; one that is only slow is not."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.status import from_rpc_error

SILENCE = 1.0
SERVER = """
import time
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.server import ServerOptions, Service, build_server
from tests.rpc.echo import DESCRIPTOR, Echo, rules

class Slow(Echo):
    def Evaluate(self, requests, context):
        for request in requests:
            if request.frame == b"sleep":
                time.sleep(3)
            if request.frame == b"hold":  # the interpreter's lock, as a long call into C may
                number, end = 10 ** 200_000, time.monotonic() + 3
                while time.monotonic() < end:
                    number * number
            yield pb.EvaluateResponse()

server = build_server([Service(DESCRIPTOR, Slow(), rules())], ServerOptions("127.0.0.1:0"))
server.start()
print(server.address, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[tuple[int, str]]:
    """(process id, address)"""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.pid, process.stdout.readline().strip()
    process.kill()
    process.communicate()


@pytest.fixture
def channel(peer: tuple[int, str]) -> Iterator[grpc.Channel]:
    os.kill(peer[0], signal.SIGCONT)
    with open_channel(peer[1], wait_ready_seconds=20, silence_seconds=SILENCE) as opened:
        yield opened
    os.kill(peer[0], signal.SIGCONT)


def open_stream(channel: grpc.Channel) -> tuple[queue.SimpleQueue[Any], Any]:
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: Any = he_lora_pb2_grpc.HeLoraServiceStub(channel).Evaluate(iter(outgoing.get, None))
    outgoing.put(pb.EvaluateRequest(frame=b"x"))
    next(answers)
    return outgoing, answers


# Large ones do not fit into the sockets: then not even a ping can be sent.
@pytest.mark.parametrize("sizes", [[100], [1_000_000] * 12])
@pytest.mark.parametrize("idle_seconds", [0.0, 1.0])
def test_a_stopped_peer_is_given_up(
    peer: tuple[int, str], channel: grpc.Channel, sizes: list[int], idle_seconds: float
) -> None:
    outgoing, answers = open_stream(channel)
    time.sleep(idle_seconds)
    os.kill(peer[0], signal.SIGSTOP)
    started = time.monotonic()
    for size in sizes:
        outgoing.put(pb.EvaluateRequest(frame=bytes(size)))
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert isinstance(from_rpc_error(caught.value), UnavailableError)
    # Seconds, not the half minute that deltas may take; the machine may be busy.
    assert time.monotonic() - started < 10 * SILENCE


def test_it_is_noticed_while_nothing_is_asked(peer: tuple[int, str], channel: grpc.Channel) -> None:
    _, answers = open_stream(channel)
    os.kill(peer[0], signal.SIGSTOP)
    with pytest.raises(grpc.RpcError):
        next(answers)


@pytest.mark.parametrize("work", [b"sleep", b"hold"])
def test_a_peer_that_computes_for_long_is_waited_for(channel: grpc.Channel, work: bytes) -> None:
    outgoing, answers = open_stream(channel)
    started = time.monotonic()
    outgoing.put(pb.EvaluateRequest(frame=work))
    for _ in range(12):
        outgoing.put(pb.EvaluateRequest(frame=bytes(1_000_000)))
    for _ in range(13):
        next(answers)
    assert time.monotonic() - started >= 3 * SILENCE


def test_pings_are_not_taken_for_a_flood(channel: grpc.Channel) -> None:
    outgoing, answers = open_stream(channel)
    time.sleep(7 * SILENCE)  # gRPC forgives the first ones
    outgoing.put(pb.EvaluateRequest(frame=b"x"))
    next(answers)


def test_a_silence_that_servers_would_refuse(peer: tuple[int, str]) -> None:
    with pytest.raises(ConfigurationError, match="silence_seconds"):
        open_channel(peer[1], silence_seconds=0.5)
