"""Mutual TLS between a real server and real channels: who is let in, and whom a channel reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tensorguard.errors import (
    AuthenticationError,
    ConfigurationError,
    PermissionDeniedError,
    TenSafeError,
    UnavailableError,
)
from tensorguard.rpc.authorisation import PUBLIC, Rule, bearer, both, certified
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.channel import open_async_channel, open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.server import Listener, Server, ServerOptions, Service, build_async_server, build_server
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity, peer_of, server_credentials
from tests.rpc.echo import DESCRIPTOR, AsyncEcho, Echo, rules
from tests.support.tls import tls_identity

AUTHORITY = Authority.generate(time.time())
FOREIGN = Authority.generate(time.time())
SERVER = ServiceName("coprocessor", "acme")
HOST = ServiceName("inference", "acme")


@contextmanager
def serving(
    identity: Callable[[], TlsIdentity] | None = None, rule: Rule = PUBLIC, servicer: Any = None
) -> Iterator[Server]:
    """A server with mutual TLS; by default an honest one."""
    own = tls_identity(AUTHORITY, SERVER)
    options = ServerOptions("127.0.0.1:0", workers=4, credentials=server_credentials(identity or (lambda: own)))
    server = build_server([Service(DESCRIPTOR, servicer or Echo(), rules(GetStatus=rule))], options)
    server.start()
    try:
        yield server
    finally:
        server.stop(0)


def channel_tls(identity: TlsIdentity | None, expected: ServiceName = SERVER) -> ChannelTls:
    return ChannelTls((identity or tls_identity(AUTHORITY, HOST)).authority, expected, identity)


def ask(address: str, tls: ChannelTls | None) -> None:
    """Raises the TenSafe error that a client sees."""
    with open_channel(address, tls=tls) as channel:
        try:
            he_lora_pb2_grpc.HeLoraServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from None


def test_both_are_certified() -> None:
    with serving() as server:
        ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST)))


def test_a_client_may_expect_a_role_of_any_tenant() -> None:
    with serving() as server:
        ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST), ServiceName("coprocessor")))


# Callers who are not let in


@pytest.mark.parametrize(
    "tls",
    [
        None,
        channel_tls(None),
        channel_tls(tls_identity(FOREIGN, HOST, trusts=AUTHORITY)),
        channel_tls(tls_identity(AUTHORITY, HOST, ago=1000, life=900)),
        channel_tls(tls_identity(AUTHORITY, HOST, ago=-1000)),
    ],
    ids=["plaintext", "no certificate", "foreign authority", "ended", "not begun"],
)
def test_callers_without_a_good_certificate_reach_nothing(tls: ChannelTls | None) -> None:
    asked: list[object] = []

    class Counting(Echo):
        def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
            asked.append(request)
            return super().GetStatus(request, context)

    with serving(servicer=Counting()) as server:
        with pytest.raises(UnavailableError):
            ask(server.address, tls)
        assert not asked
        ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST)))
        assert asked


def test_the_rule_asks_for_the_role() -> None:
    with serving(rule=certified("inference")) as server:
        ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST)))
        for role in ("gateway", "coprocessor", "attestor"):
            with pytest.raises(PermissionDeniedError, match=role):
                ask(server.address, channel_tls(tls_identity(AUTHORITY, ServiceName(role, "acme"))))


def test_a_role_does_not_replace_a_secret() -> None:
    with serving(rule=both(certified("gateway"), bearer("secret-of-sixteen-letters"))) as server:
        with pytest.raises(AuthenticationError, match="secret"):
            ask(server.address, channel_tls(tls_identity(AUTHORITY, ServiceName("gateway"))))
        with pytest.raises(PermissionDeniedError):
            ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST)))


def test_where_no_certificate_is_asked_for_the_rule_refuses() -> None:
    """The two addresses of the attestor: one for who has no certificate yet."""
    own = tls_identity(AUTHORITY, SERVER)
    options = ServerOptions(
        "127.0.0.1:0",
        credentials=server_credentials(lambda: own, mutual=False),
        further=Listener("127.0.0.1:0", server_credentials(lambda: own), "--further"),
    )
    server = build_server([Service(DESCRIPTOR, Echo(), rules(GetStatus=certified("inference")))], options)
    server.start()
    try:
        host = tls_identity(AUTHORITY, HOST)
        for tls in (channel_tls(None), channel_tls(host)):
            with pytest.raises(AuthenticationError, match="certificate"):
                ask(server.address, tls)
        ask(server.further_address, channel_tls(host))
        with pytest.raises(UnavailableError):
            ask(server.further_address, channel_tls(None))
    finally:
        server.stop(0)


# Servers that are not whom the channel is for


@pytest.mark.parametrize(
    "identity",
    [
        tls_identity(FOREIGN, SERVER, trusts=AUTHORITY),
        tls_identity(AUTHORITY, SERVER, ago=1000, life=900),
        tls_identity(AUTHORITY, ServiceName("inference", "acme")),
        tls_identity(AUTHORITY, ServiceName("gateway")),
        tls_identity(AUTHORITY, ServiceName("coprocessor", "other")),
        tls_identity(AUTHORITY, ServiceName("coprocessor")),
    ],
    ids=["foreign authority", "ended", "another role", "enrolled", "another tenant", "no tenant"],
)
def test_a_channel_reaches_only_whom_it_expects(identity: TlsIdentity) -> None:
    with serving(lambda: identity) as server, pytest.raises(UnavailableError):
        ask(server.address, channel_tls(tls_identity(AUTHORITY, HOST)))


def test_a_renewed_certificate_is_shown_at_the_next_connection() -> None:
    present = [tls_identity(AUTHORITY, SERVER, ago=1000, life=900)]
    tls = channel_tls(tls_identity(AUTHORITY, HOST))
    with serving(lambda: present[0]) as server:
        with pytest.raises(UnavailableError):
            ask(server.address, tls)
        present[0] = tls_identity(AUTHORITY, SERVER)
        ask(server.address, tls)


def test_another_authority_counts_from_the_next_connection_on() -> None:
    """Both in the overlap of a rotation; the old one no more when the file has only the new one."""
    own = tls_identity(AUTHORITY, SERVER)
    present = [own]
    old, new = (tls_identity(authority, HOST) for authority in (AUTHORITY, FOREIGN))
    with serving(lambda: present[0]) as server:
        for trusted, served in ((AUTHORITY.pem, old), (AUTHORITY.pem + FOREIGN.pem, new), (FOREIGN.pem, new)):
            present[0] = replace(own, authority=trusted)
            ask(server.address, ChannelTls(AUTHORITY.pem, SERVER, served))
            if trusted != AUTHORITY.pem + FOREIGN.pem:
                with pytest.raises(UnavailableError):
                    ask(server.address, ChannelTls(AUTHORITY.pem, SERVER, new if served is old else old))


def test_a_channel_that_has_to_be_ready_says_so() -> None:
    identity = tls_identity(FOREIGN, SERVER, trusts=AUTHORITY)
    tls = channel_tls(tls_identity(AUTHORITY, HOST))
    with serving(lambda: identity) as server, pytest.raises(UnavailableError, match="one authority"):
        open_channel(server.address, tls=tls, wait_ready_seconds=0.5)


PLAINTEXT = r"not a loopback address.*attestor_authority.*plaintext_network"


@pytest.mark.parametrize("endpoint", ["service.example:7402", "10.0.0.1:7402", "[fd00::1]:7402", "dns:///localhost:1"])
async def test_a_plaintext_channel_beyond_loopback_has_to_be_permitted(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match=PLAINTEXT):
        open_channel(endpoint)
    with pytest.raises(ConfigurationError, match=PLAINTEXT):
        await open_async_channel(endpoint)
    open_channel(endpoint, plaintext_network=True).close()
    await (await open_async_channel(endpoint, plaintext_network=True)).close()
    open_channel(endpoint, tls=channel_tls(None)).close()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:7402", "localhost:7402", "[::1]:7402", "unix:/run/tensafe.socket"])
def test_a_plaintext_channel_on_this_machine(endpoint: str) -> None:
    open_channel(endpoint).close()


async def test_asyncio_servers_and_channels() -> None:
    own = tls_identity(AUTHORITY, SERVER)
    table = rules(GetStatus=certified("inference"))
    options = ServerOptions("127.0.0.1:0", credentials=server_credentials(lambda: own))
    server = build_async_server([Service(DESCRIPTOR, AsyncEcho(), table)], options)
    await server.start()

    async def ask_as(name: ServiceName) -> TenSafeError | None:
        channel = await open_async_channel(server.address, tls=channel_tls(tls_identity(AUTHORITY, name)))
        try:
            await he_lora_pb2_grpc.HeLoraServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        finally:
            await channel.close()
        return None

    try:
        assert await ask_as(HOST) is None
        assert isinstance(await ask_as(ServiceName("gateway")), PermissionDeniedError)
    finally:
        await server.stop(0)


def test_the_peer_is_who_its_certificate_names() -> None:
    identity = tls_identity(AUTHORITY, HOST)
    peer = peer_of({"x509_pem_cert": [identity.certificate]})
    assert peer is not None and peer.name == HOST
    assert peer_of({}) is None
    for bad in (b"x", AUTHORITY.pem, identity.certificate + bytes(10_000)):
        with pytest.raises(AuthenticationError):
            peer_of({"x509_pem_cert": [bad]})


def test_an_identity_does_not_show_its_key() -> None:
    identity = tls_identity(AUTHORITY, HOST)
    assert "PRIVATE" not in repr(identity) and "PRIVATE" not in repr(ChannelTls(AUTHORITY.pem, SERVER, identity))
