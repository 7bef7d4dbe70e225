"""Sessions over mutual TLS: attestor, coprocessor and host, each with a certificate of the attestor's authority."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from tensorguard.errors import AuthenticationError, PermissionDeniedError, UnavailableError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.tls import CertifiedKey
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world
from tests.support.tls import tls_identity

COPROCESSOR = ServiceName("coprocessor", TENANT)
HOST = ServiceName("inference", TENANT)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("secured"), tls=True) as running:
        yield running


def authority(world: World) -> bytes:
    assert world.authority is not None
    return world.authority.read_bytes()


def host_identity(world: World) -> TlsIdentity:
    """Of an attested host."""
    workload = world.workload()
    workload.token()
    assert workload.client.tls is not None
    return workload.client.tls.identity()


def begin(world: World, identity: TlsIdentity | None, token: str = "", expected: ServiceName = COPROCESSOR) -> None:
    """Ask for a session over a connection with this certificate."""
    with open_channel(world.endpoint, tls=ChannelTls(authority(world), expected, identity)) as channel:
        request = pb.BeginSessionRequest(
            host_token=token, host_nonce=bytes(32), parameter_set="n4096-q90-w12", tenant=TENANT
        )
        try:
            he_lora_pb2_grpc.HeLoraServiceStub(channel).BeginSession(request, timeout=10)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def test_a_session_over_tls(secured: World) -> None:
    workload = secured.workload()
    options = SessionOptions(reply_seconds=60.0)
    with CoprocessorSession.open(
        secured.endpoint, workload, verify_keys=[secured.publisher.public], options=options
    ) as session:
        adapter = session.attach(ADAPTER)
        x = np.ones((2, adapter.shape(0, "qkv").d_in), np.float32)
        assert session.begin(adapter, 0, "qkv", x).wait().shape == (2, adapter.shape(0, "qkv").rows)


def test_a_host_without_tls_reaches_nothing(secured: World) -> None:
    workload = secured.workload()
    workload.token()
    workload.client.tls = None
    with pytest.raises(UnavailableError):
        CoprocessorSession.open(
            secured.endpoint,
            workload,
            verify_keys=[secured.publisher.public],
            options=SessionOptions(connect_seconds=1.0),
        )


@pytest.mark.parametrize("who", ["no certificate", "foreign authority"])
def test_a_host_that_is_not_certified_reaches_nothing(secured: World, who: str) -> None:
    identity = None
    if who == "foreign authority":
        foreign = tls_identity(Authority.generate(time.time()), HOST)
        identity = TlsIdentity(foreign.private_key, foreign.certificate, authority(secured))
    with pytest.raises(UnavailableError):
        begin(secured, identity)


def test_another_attested_role_opens_no_session(secured: World) -> None:
    workload = secured.workload(role=Role.COPROCESSOR, package_id=ADAPTER)
    token = workload.token()
    assert workload.client.tls is not None
    with pytest.raises(PermissionDeniedError, match="not for the role coprocessor"):
        begin(secured, workload.client.tls.identity(), token)


def test_a_token_is_good_on_its_own_workloads_connection_only(secured: World) -> None:
    """A man in the middle who is an attested host itself passes the token of another one on."""
    victim = secured.workload()
    with pytest.raises(AuthenticationError, match="not the one of the workload"):
        begin(secured, host_identity(secured), victim.token())
    assert victim.client.tls is not None
    begin(secured, victim.client.tls.identity(), victim.token())


@pytest.mark.parametrize(
    "expected", [HOST, ServiceName("coprocessor", "other"), ServiceName("attestor"), ServiceName("gateway")], ids=str
)
def test_a_host_reaches_only_the_coprocessor_of_its_tenant(secured: World, expected: ServiceName) -> None:
    with pytest.raises(UnavailableError):
        begin(secured, host_identity(secured), "", expected)


def test_another_authority_is_not_believed(secured: World) -> None:
    other = CertifiedKey(Authority.generate(time.time()).pem)
    tls = ChannelTls(other.authority, COPROCESSOR, host_identity(secured))
    with pytest.raises(UnavailableError, match="one authority"):
        open_channel(secured.endpoint, tls=tls, wait_ready_seconds=1.0)


def test_a_coprocessor_renews_its_certificate_before_it_ends(secured: World) -> None:
    """Its keeper asks the workload for a token once a second; the workload attests again in time."""
    certificate = secured.coprocessor.certificate
    assert certificate is not None and certificate._thread.is_alive()
    workload = secured.coprocessor.servicer._workload
    assert workload.client.tls is not None
    first = workload.client.tls.identity().certificate
    workload._expires_at = 0
    deadline = time.monotonic() + 10
    while workload.client.tls.identity().certificate == first:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begin(secured, *_own(secured))


def _own(world: World) -> tuple[TlsIdentity, str]:
    workload = world.workload()
    token = workload.token()
    assert workload.client.tls is not None
    return workload.client.tls.identity(), token
