"""Somebody between host and coprocessor who is attested as both: tokens and keys of its own, all of them valid.

It sees and may change every message. What it must not manage: that one of the two opens a session with it while it
believes to have opened one with the other, or under a CKKS key of its choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from services.he_lora.servicer import RULES
from tensorguard.ckks.host import HostSession
from tensorguard.ckks.packing import pack
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.errors import AuthenticationError, PermissionDeniedError, TenSafeError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.server import ServerOptions, Service, build_server
from tensorguard.rpc.status import from_rpc_error
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tensorguard.session.transcript import SessionTranscript, join_basis, split_basis
from tests.support.coprocessor import ADAPTER, TENANT, World
from tests.support.raw_host import RawHost

PARAMETERS = get_parameter_set(DEFAULT_PARAMETER_SET)
Change = Callable[["Intruder", Any], None]


class Intruder:
    """Passes everything on. `on[...]` changes a request on its way up, or an answer on its way down."""

    def __init__(self, world: World, channel: grpc.Channel) -> None:
        self.as_host: Workload = world.workload()
        self.as_coprocessor: Workload = world.workload(Role.COPROCESSOR, ADAPTER)
        self.stub: Any = he_lora_pb2_grpc.HeLoraServiceStub(channel)
        self.on: dict[type, Change] = {}
        self.begun: pb.BeginSessionRequest = pb.BeginSessionRequest()
        """As the host sent it."""
        self.answered: pb.BeginSessionResponse = pb.BeginSessionResponse()
        """As the coprocessor sent it."""

    def transcript(self, **changes: Any) -> SessionTranscript:
        """What host and coprocessor agreed on, with changes."""
        values = {
            "tenant": self.begun.tenant,
            "parameter_set": self.begun.parameter_set,
            "session_id": self.answered.session_id,
            "host_nonce": self.begun.host_nonce,
            "coprocessor_nonce": self.answered.coprocessor_nonce,
            "host_token": self.begun.host_token,
            "coprocessor_token": self.answered.coprocessor_token,
        }
        return SessionTranscript(**{**values, **changes})

    def pass_on(self, method: str, request: Any) -> Any:
        if isinstance(request, pb.BeginSessionRequest):
            self.begun.CopyFrom(request)
        self.on.get(type(request), _unchanged)(self, request)
        try:
            answer = getattr(self.stub, method)(request, timeout=10)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        if isinstance(answer, pb.BeginSessionResponse):
            self.answered.CopyFrom(answer)
        self.on.get(type(answer), _unchanged)(self, answer)
        return answer

    def Evaluate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        metadata = [pair for pair in context.invocation_metadata() if pair[0] == "tensafe-session-bin"]
        yield from self.stub.Evaluate(requests, metadata=metadata)

    def __getattr__(self, method: str) -> Any:
        if method not in RULES:
            raise AttributeError(method)
        return lambda request, context: self.pass_on(method, request)


def _unchanged(intruder: Intruder, message: Any) -> None:
    pass


@contextmanager
def between(world: World) -> Iterator[tuple[Intruder, str]]:
    """The intruder and the address at which hosts find it instead of the coprocessor."""
    with open_channel(world.endpoint) as channel:
        intruder = Intruder(world, channel)
        service = Service(pb.DESCRIPTOR.services_by_name["HeLoraService"], intruder, RULES)
        server = build_server([service], ServerOptions("127.0.0.1:0", workers=8))
        server.start()
        try:
            yield intruder, server.address
        finally:
            server.stop(0)


def open_session(world: World, address: str, workload: Workload | None = None) -> CoprocessorSession:
    options = SessionOptions(reply_seconds=60.0, shared_memory_bytes=0)
    host = workload or world.workload()
    return CoprocessorSession.open(address, host, verify_keys=[world.publisher.public], options=options)


def two_tokens(workload: Workload) -> tuple[str, str]:
    """An earlier one and the present one, for the same attested key; both are valid."""
    earlier = workload.token()
    workload._expires_at = 0
    return earlier, workload.token()


def test_unchanged_messages_open_a_session_between_the_two(world: World) -> None:
    """The control of this module: it passes on what it must, and what it passes on is ciphertext."""
    with between(world) as (_, address), open_session(world, address) as session:
        adapter = session.attach(ADAPTER)
        x = np.ones((1, adapter.shape(0, "qkv").d_in), np.float32)
        assert session.begin(adapter, 0, "qkv", x).wait().shape == (1, adapter.shape(0, "qkv").rows)


# Relayed and swapped tokens


def own_host_token(intruder: Intruder, request: pb.BeginSessionRequest) -> None:
    request.host_token = intruder.as_host.token()


def own_coprocessor_token(intruder: Intruder, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_token = intruder.as_coprocessor.token()


def own_host_token_as_coprocessor(intruder: Intruder, answer: pb.BeginSessionResponse) -> None:
    """With a signature that is right for the token."""
    answer.coprocessor_token = intruder.as_host.token()
    transcript = intruder.transcript(coprocessor_token=answer.coprocessor_token)
    answer.signature = intruder.as_host.identity.sign(transcript.coprocessor_statement())


def hosts_own_token(intruder: Intruder, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_token = intruder.begun.host_token


def signed_with_own_key(intruder: Intruder, answer: pb.BeginSessionResponse) -> None:
    """The coprocessor's token, the transcript of both, but the intruder's attested key."""
    answer.signature = intruder.as_coprocessor.identity.sign(intruder.transcript().coprocessor_statement())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (own_host_token, AuthenticationError),
        (own_coprocessor_token, AuthenticationError),
        (own_host_token_as_coprocessor, PermissionDeniedError),
        (hosts_own_token, PermissionDeniedError),
        (signed_with_own_key, AuthenticationError),
    ],
)
def test_a_host_opens_no_session_with_swapped_tokens(world: World, change: Change, error: type[TenSafeError]) -> None:
    with between(world) as (intruder, address):
        message = pb.BeginSessionRequest if change is own_host_token else pb.BeginSessionResponse
        intruder.on[message] = change
        with pytest.raises(error) as caught:
            open_session(world, address)
        assert caught.value.reason == error.reason


@pytest.mark.parametrize("whose", ["host", "coprocessor"])
def test_an_earlier_token_of_the_same_workload_is_another_token(world: World, whose: str) -> None:
    """The attested keys are the same; what the tokens say of policy and package need not be."""
    host = world.workload()
    earlier, _ = two_tokens(host if whose == "host" else world.coprocessor.servicer._workload)

    def swap(_: Intruder, message: Any) -> None:
        setattr(message, f"{whose}_token", earlier)

    with between(world) as (intruder, address):
        intruder.on[pb.BeginSessionRequest if whose == "host" else pb.BeginSessionResponse] = swap
        with pytest.raises(AuthenticationError):
            open_session(world, address, host)


def test_a_host_opens_no_session_that_was_begun_for_another(world: World) -> None:
    """The answer to one host is given to the next: same tenant, same coprocessor, another host nonce and token."""
    with between(world) as (intruder, address), open_session(world, address):
        earlier = pb.BeginSessionResponse()
        earlier.CopyFrom(intruder.answered)
        intruder.on[pb.BeginSessionResponse] = lambda _, answer: answer.CopyFrom(earlier)
        with pytest.raises(AuthenticationError):
            open_session(world, address)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: setattr(answer, "coprocessor_nonce", os.urandom(32)),
        lambda answer: setattr(answer, "session_id", os.urandom(16)),
    ],
    ids=["nonce", "session id"],
)
def test_a_host_opens_no_session_with_a_changed_transcript(world: World, change: Callable[[Any], None]) -> None:
    with between(world) as (intruder, address):
        intruder.on[pb.BeginSessionResponse] = lambda _, answer: change(answer)
        with pytest.raises(AuthenticationError):
            open_session(world, address)


# The CKKS key


def own_key(intruder: Intruder, request: pb.CompleteSessionRequest) -> None:
    transcript = intruder.transcript()
    key = HostSession.create(PARAMETERS, transcript.pk1_seed(0), transcript.session_id)
    request.public_key = pack(key.public_key).tobytes()
    key.close()


def own_key_signed_with_the_own_key(intruder: Intruder, request: pb.CompleteSessionRequest) -> None:
    own_key(intruder, request)
    statement = intruder.transcript().host_key_statement(0, request.public_key)
    request.signature = intruder.as_host.identity.sign(statement)


def own_key_and_transcript(intruder: Intruder, request: pb.CompleteSessionRequest) -> None:
    """Signed as if the session were the intruder's own."""
    own_key(intruder, request)
    transcript = intruder.transcript(host_token=intruder.as_host.token())
    request.signature = intruder.as_host.identity.sign(transcript.host_key_statement(0, request.public_key))


@pytest.mark.parametrize("change", [own_key, own_key_signed_with_the_own_key, own_key_and_transcript])
def test_the_coprocessor_takes_no_other_ckks_key(world: World, change: Change) -> None:
    with between(world) as (intruder, address):
        intruder.on[pb.CompleteSessionRequest] = change
        with pytest.raises(AuthenticationError):
            open_session(world, address)
        session = world.coprocessor.servicer._registry._sessions.get(intruder.answered.session_id)
        assert session is None or not session.keys


def test_a_ckks_key_of_another_session_is_refused(world: World) -> None:
    """A host's own key and signature, from an earlier session of the same host with the same coprocessor."""
    kept: list[pb.CompleteSessionRequest] = []

    def keep(_: Intruder, request: pb.CompleteSessionRequest) -> None:
        kept.append(pb.CompleteSessionRequest.FromString(request.SerializeToString()))

    def replay(_: Intruder, request: pb.CompleteSessionRequest) -> None:
        request.public_key, request.signature = kept[0].public_key, kept[0].signature

    host = world.workload()
    with between(world) as (intruder, address):
        intruder.on[pb.CompleteSessionRequest] = keep
        open_session(world, address, host).close()
        intruder.on[pb.CompleteSessionRequest] = replay
        with pytest.raises(AuthenticationError):
            open_session(world, address, host)


# The basis


def test_a_basis_that_was_sealed_for_the_intruder_is_not_the_hosts(world: World) -> None:
    """The intruder attaches the adapter in a session of its own, as the attested host it also is, and seals the basis
    again, for the host whom it sits before.
    """
    basis = basis_of(world)

    def replace(intruder: Intruder, answer: pb.AttachAdapterResponse) -> None:
        host = intruder.as_host.client.verifier().verify(intruder.begun.host_token, tenant=TENANT).identity
        statement = intruder.transcript().basis_statement(ADAPTER, world.package.digest, basis)
        signed = join_basis(intruder.as_coprocessor.identity.sign(statement), basis)
        answer.sealed_basis = host.seal(signed, intruder.transcript().basis_info(ADAPTER, world.package.digest))

    with between(world) as (intruder, address), open_session(world, address) as session:
        intruder.on[pb.AttachAdapterResponse] = replace
        with pytest.raises(AuthenticationError):
            session.attach(ADAPTER)


def basis_of(world: World) -> bytes:
    """What the coprocessor gives any attested host."""
    with RawHost(world) as host:
        transcript = host.begin()
        host.complete()
        sealed = host.attach().sealed_basis
        opened = host.workload.identity.open(sealed, transcript.basis_info(ADAPTER, world.package.digest))
        return split_basis(opened)[1]
