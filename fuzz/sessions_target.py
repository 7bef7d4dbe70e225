"""A coprocessor's session handling: calls in any order with changed messages, in process, on a real coprocessor.

An input is a list of steps; consecutive evaluation steps are the messages of one stream:

    step = operation u8, length u8, edits of that length (fuzz.edits)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from fuzz.coprocessor import FuzzedCoprocessor, check_reasons, fuzzed_world
from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.target import Target
from tensorguard.errors import TenSafeError
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames
from tests.support.coprocessor import ADAPTER, TENANT, World
from tests.support.raw_host import PARAMETERS, RawHost

# A response costs up to a few hundred kB of sums for each row group, whatever the request's size.
FACTOR, ALLOWANCE = 32, 16 * 1024 * 1024
EVALUATE, WAIT = "Evaluate", "wait"


@contextmanager
def sessions_target(folder: Path) -> Iterator[Target]:
    """On a coprocessor of its own."""
    with fuzzed_world(folder) as world:
        yield world_target(world)


def world_target(world: World) -> Target:
    """On a coprocessor that runs."""
    fuzzed = _Fuzzed(world)
    evaluations = [bytes([0, 1, i]) for i in range(len(fuzzed.requests) + 1)]
    calls = [bytes([1 + i, 1, 0]) for i in range(len(fuzzed.steps) - 1)]
    ordered = b"".join((*evaluations[:2], *calls, *evaluations[:1]))
    return Target("sessions", [*evaluations, *calls, b"".join(evaluations), ordered], fuzzed.run)


class _Plaintext:
    """The part of a gRPC context that the coprocessor reads, on a connection without TLS."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


class _Fuzzed:
    """One attested host. Every input finds its session completed and an adapter attached."""

    def __init__(self, world: World) -> None:
        with RawHost(world) as host:
            host.begin()
            host.complete()
            host.attach()
            self._coprocessor = FuzzedCoprocessor(world, host)
            self.requests = [frames.write_request(host.request(tokens)[0]) for tokens in (1, 3, 1)]
            self.steps = self._make_steps(host)

    def _make_steps(self, host: RawHost) -> list[tuple[str, Any, list[bytes]]]:
        """Name, message type and well-formed messages of every operation."""
        transcript = self._coprocessor.transcript
        session_id = transcript.session_id
        token, identity = host.workload.token(), host.workload.identity
        begin = pb.BeginSessionRequest(
            host_token=token, host_nonce=bytes(32), parameter_set=PARAMETERS.name, tenant=TENANT
        )
        complete = []
        for number, key in ((1, b"\0" * 16), (1, self._sent_key(host)), (2, self._sent_key(host))):
            signature = identity.sign(transcript.host_key_statement(number, key))
            complete.append(
                pb.CompleteSessionRequest(session_id=session_id, key_number=number, public_key=key, signature=signature)
            )
        known = {
            "BeginSession": [begin],
            "CompleteSession": complete,
            "AttachAdapter": [pb.AttachAdapterRequest(session_id=session_id, adapter=ADAPTER)],
            "CloseSession": [pb.CloseSessionRequest(session_id=session_id)],
            "ListAdapters": [pb.ListAdaptersRequest()],
            "GetStatus": [pb.GetStatusRequest()],
        }
        # Whatever else the service has, with nothing but the session filled in. Operations keep their numbers.
        methods = pb.DESCRIPTOR.services_by_name["HeLoraService"].methods_by_name
        for name in sorted(set(methods) - set(known) - {EVALUATE}):
            kind = GetMessageClass(methods[name].input_type)
            fields = methods[name].input_type.fields_by_name
            known[name] = [kind(session_id=session_id) if "session_id" in fields else kind()]
        written = [(name, type(some[0]), [m.SerializeToString() for m in some]) for name, some in known.items()]
        return [(EVALUATE, None, self.requests), (WAIT, None, [b""]), *written]

    def _sent_key(self, host: RawHost) -> bytes:
        """The public key as this host sends it, in whatever form the protocol has."""
        sent: list[Any] = []
        with mock.patch.object(host, "call", lambda _, request: sent.append(request)):
            host.complete()
        return bytes(sent[0].public_key)

    def run(self, data: bytes) -> None:
        steps = list(self._parse(data))
        session = self._coprocessor.open_session()
        opened = [self._coprocessor.transcript.session_id]
        with bounded_memory(sum(len(message) for _, message in steps), FACTOR, ALLOWANCE):
            try:
                for name, group in itertools.groupby(steps, lambda step: step[0]):
                    messages = [message for _, message in group]
                    if name == EVALUATE:
                        self._evaluate(messages)
                    elif name == WAIT:
                        self._coprocessor.waited += sum(map(len, messages))
                    else:
                        opened += self._call(name, messages)
            finally:
                for session_id in opened:
                    self._coprocessor.registry.remove(session_id)
        check_reasons(session)

    def _parse(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        position = 0
        while position + 2 <= len(data):
            operation, length = data[position], data[position + 1]
            position += 2 + length
            name, _, messages = self.steps[operation % len(self.steps)]
            edits = data[position - length : position]
            yield name, bytes(7 * length) if name == WAIT else message_from(edits, messages)

    def _evaluate(self, messages: list[bytes]) -> None:
        last = 0
        for answer in self._coprocessor.evaluate(iter(messages)):
            response = frames.read_response(answer, PARAMETERS)
            if isinstance(response, frames.EvaluationResponse):
                assert response.request_id > last, "a request id was answered twice"
                last = response.request_id

    def _call(self, name: str, messages: list[bytes]) -> Iterator[bytes]:
        """Session ids that were opened."""
        method: Callable[[Any, Any], Any] = getattr(self._coprocessor.servicer, name)
        kind = next(kind for known, kind, _ in self.steps if known == name)
        for message in messages:
            try:
                request = kind.FromString(message)
            except DecodeError:
                continue  # gRPC refuses it
            try:
                answer = method(request, _Plaintext())
            except TenSafeError:
                continue
            assert kind is not None and answer.IsInitialized()
            if name == "BeginSession":
                yield answer.session_id
