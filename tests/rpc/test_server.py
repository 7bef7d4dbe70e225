from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tensorguard.errors import (
    AuthenticationError,
    BudgetExhaustedError,
    ConfigurationError,
    InternalError,
    UnavailableError,
)
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.authorisation import PUBLIC, Rule, bearer
from tensorguard.rpc.channel import open_async_channel, open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.guard import SyncGuard
from tensorguard.rpc.server import Codec, Server, ServerOptions, Service, build_async_server, build_server
from tensorguard.rpc.status import REASON_KEY, from_rpc_error
from tests.rpc.echo import DESCRIPTOR, SECRET, AsyncEcho, Echo, rules


def options(**changes: Any) -> ServerOptions:
    return ServerOptions(**{"address": "127.0.0.1:0", "workers": 4} | changes)


@pytest.fixture
def server() -> Iterator[Server]:
    built = build_server([Service(DESCRIPTOR, Echo(), rules())], options(reflection=True))
    built.start()
    yield built
    built.stop(0)


@pytest.fixture
def stub(server: Server) -> Iterator[he_lora_pb2_grpc.HeLoraServiceStub]:
    with open_channel(server.address, wait_ready_seconds=5) as channel:
        yield he_lora_pb2_grpc.HeLoraServiceStub(channel)


def error_of(call: Any, request: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=5)
    return caught.value


def test_typed_error_reaches_the_caller(stub: he_lora_pb2_grpc.HeLoraServiceStub) -> None:
    error: Any = error_of(stub.ListAdapters, pb.ListAdaptersRequest())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (REASON_KEY, "budget_exhausted") in list(error.trailing_metadata())
    restored = from_rpc_error(error)
    assert type(restored) is BudgetExhaustedError and "pack a new sequence" in restored.message


def test_unexpected_error_tells_nothing(stub: he_lora_pb2_grpc.HeLoraServiceStub) -> None:
    log = io.StringIO()
    configure_logging("test", stream=log)
    error: Any = error_of(stub.CloseSession, pb.CloseSessionRequest())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in error.details() and type(from_rpc_error(error)) is InternalError
    assert "ValueError" in log.getvalue() and "CloseSession" in log.getvalue() and "request_id" in log.getvalue()
    assert SECRET not in log.getvalue()


def test_error_in_the_middle_of_a_stream(stub: he_lora_pb2_grpc.HeLoraServiceStub) -> None:
    call = stub.Evaluate(iter([pb.EvaluateRequest(frame=b"one"), pb.EvaluateRequest(frame=b"fail")]))
    assert next(call).frame == b"one"
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert type(from_rpc_error(caught.value)) is BudgetExhaustedError


def test_request_id_is_taken_over_or_made(stub: he_lora_pb2_grpc.HeLoraServiceStub) -> None:
    def answered(*metadata: tuple[str, str]) -> str:
        return stub.GetStatus(pb.GetStatusRequest(), metadata=metadata).version

    assert answered(("x-request-id", "abc-1")) == "abc-1"
    first, second = answered(), answered()
    assert len(first) == 24 and first != second
    assert answered(("x-request-id", "two words")) not in ("", "two words")


def test_table_must_be_complete() -> None:
    table = rules()
    del table["AttachAdapter"]
    with pytest.raises(ConfigurationError, match="no authorisation rule for AttachAdapter"):
        build_server([Service(DESCRIPTOR, Echo(), table)], options())
    with pytest.raises(ConfigurationError, match="has no method Attach"):
        build_server([Service(DESCRIPTOR, Echo(), rules() | {"Attach": PUBLIC})], options())
    with pytest.raises(ConfigurationError, match="does not implement"):
        build_server([Service(DESCRIPTOR, object(), rules())], options())


def test_method_that_is_not_in_the_table_is_refused_when_called() -> None:
    class Details:
        method = "/tensafe.he_lora.v1.HeLoraService/GetStatus"
        invocation_metadata = ()

    class Context:
        aborted: tuple[Any, ...] = ()

        def invocation_metadata(self) -> Any:
            return ()

        def code(self) -> None:
            return None

        def set_trailing_metadata(self, _: Any) -> None: ...

        def abort(self, *arguments: Any) -> None:
            self.aborted = arguments
            raise RuntimeError("aborted")

    ran: list[Any] = []
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: ran.append(request))
    guarded = SyncGuard({}).intercept_service(lambda _: handler, Details())  # type: ignore[arg-type]
    context = Context()
    with pytest.raises(RuntimeError, match="aborted"):
        guarded.unary_unary(None, context)  # type: ignore[union-attr,misc,arg-type]
    assert context.aborted[0] is grpc.StatusCode.PERMISSION_DENIED and not ran


def test_rules_are_enforced() -> None:
    table = rules(GetStatus=bearer("a-secret-of-some-length"))
    built = build_server([Service(DESCRIPTOR, Echo(), table)], options())
    built.start()
    try:
        with open_channel(built.address) as channel:
            call = he_lora_pb2_grpc.HeLoraServiceStub(channel).GetStatus
            for given in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.RpcError) as caught:
                    call(pb.GetStatusRequest(), metadata=given)
                assert type(from_rpc_error(caught.value)) is AuthenticationError
            call(pb.GetStatusRequest(), metadata=(("authorization", "Bearer a-secret-of-some-length"),))
    finally:
        built.stop(0)


def test_short_bearer_secret_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="16 characters"):
        bearer("short")


def test_health_and_reflection(server: Server) -> None:
    with open_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", DESCRIPTOR.full_name):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        server.set_serving(False)
        answer = health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {service.name for service in next(listing).list_services_response.service}
        assert DESCRIPTOR.full_name in names


def test_no_reflection_unless_asked() -> None:
    built = build_server([Service(DESCRIPTOR, Echo(), rules())], options())
    built.start()
    try:
        with open_channel(built.address) as channel, pytest.raises(grpc.RpcError) as caught:
            next(
                reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                )
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    finally:
        built.stop(0)


def test_busy_port_is_a_clear_error(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    with pytest.raises(ConfigurationError, match=f"port {port} is in use: choose another with --port"):
        build_server([Service(DESCRIPTOR, Echo(), rules())], options(address=server.address, listen_option="--port"))


def test_port_is_not_shared(server: Server) -> None:
    # SO_REUSEPORT would let another process of this user take half of the connections.
    host, _, port = server.address.rpartition(":")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError):
            other.bind((host, int(port)))


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:http", "127.0.0.1:70000", ":7000"])
def test_malformed_address(address: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        build_server([Service(DESCRIPTOR, Echo(), rules())], options(address=address))


def test_plaintext_outside_loopback_must_be_permitted() -> None:
    with pytest.raises(ConfigurationError, match="not a loopback address"):
        build_server([Service(DESCRIPTOR, Echo(), rules())], options(address="0.0.0.0:0"))
    built = build_server([Service(DESCRIPTOR, Echo(), rules())], options(address="0.0.0.0:0", plaintext_network=True))
    built.stop(0)


def test_oversize_message_is_refused() -> None:
    built = build_server([Service(DESCRIPTOR, Echo(), rules())], options(message_bytes=10_000))
    built.start()
    try:
        with open_channel(built.address) as channel:
            stub = he_lora_pb2_grpc.HeLoraServiceStub(channel)
            call = stub.Evaluate(iter([pb.EvaluateRequest(frame=bytes(20_000))]))
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    finally:
        built.stop(0)


def test_codec_replaces_serialisers_on_the_same_wire() -> None:
    class Raw(Echo):
        def Evaluate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
            yield from requests

    codec = Codec(bytes, bytes)
    built = build_server([Service(DESCRIPTOR, Raw(), rules(), {"Evaluate": codec})], options())
    built.start()
    try:
        with open_channel(built.address) as channel:
            call = he_lora_pb2_grpc.HeLoraServiceStub(channel).Evaluate
            assert next(call(iter([pb.EvaluateRequest(frame=b"bytes")]))).frame == b"bytes"
    finally:
        built.stop(0)


def test_unreachable_endpoint_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 "):
        open_channel("127.0.0.1:1", wait_ready_seconds=0.1)


async def test_asyncio_server_does_the_same() -> None:
    built = build_async_server([Service(DESCRIPTOR, AsyncEcho(), rules())], options())
    await built.start()
    channel = await open_async_channel(built.address, wait_ready_seconds=5)
    try:
        stub: Any = he_lora_pb2_grpc.HeLoraServiceStub(channel)
        first = await stub.GetStatus(pb.GetStatusRequest())
        assert len(first.version) == 24
        named = await stub.GetStatus(pb.GetStatusRequest(), metadata=(("x-request-id", "abc"),))
        assert named.version == "abc"
        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListAdapters(pb.ListAdaptersRequest())
        assert type(from_rpc_error(caught.value)) is BudgetExhaustedError
        with pytest.raises(grpc.RpcError) as caught:
            await stub.CloseSession(pb.CloseSessionRequest())
        error = from_rpc_error(caught.value)
        assert type(error) is InternalError and SECRET not in error.message
        requests = [pb.EvaluateRequest(frame=b"one"), pb.EvaluateRequest(frame=b"fail")]
        received = []
        with pytest.raises(grpc.RpcError) as caught:
            async for answer in stub.Evaluate(iter(requests)):
                received.append(answer.frame)
        assert received == [b"one"] and type(from_rpc_error(caught.value)) is BudgetExhaustedError
        with pytest.raises(ConfigurationError, match="is in use"):
            build_async_server([Service(DESCRIPTOR, AsyncEcho(), rules())], options(address=built.address))
    finally:
        await channel.close()
        await built.stop(0)


async def test_asyncio_rules_are_enforced() -> None:
    def refuse(call: Any) -> None:
        raise AuthenticationError("no")

    table = rules(GetStatus=Rule("never", refuse), Evaluate=Rule("never", refuse))
    built = build_async_server([Service(DESCRIPTOR, AsyncEcho(), table)], options())
    await built.start()
    channel = await open_async_channel(built.address)
    try:
        stub: Any = he_lora_pb2_grpc.HeLoraServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetStatus(pb.GetStatusRequest())
        assert type(from_rpc_error(caught.value)) is AuthenticationError
        with pytest.raises(grpc.RpcError) as caught:
            async for _ in stub.Evaluate(iter([pb.EvaluateRequest(frame=b"x")])):
                pass
        assert type(from_rpc_error(caught.value)) is AuthenticationError
    finally:
        await channel.close()
        await built.stop(0)


_SERVE = """
import sys
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.server import ServerOptions, Service, build_server, serve_until_signalled
from tests.rpc.echo import DESCRIPTOR, Echo, rules
configure_logging("echo")
server = build_server([Service(DESCRIPTOR, Echo(), rules())], ServerOptions("127.0.0.1:0"))
server.start()
serve_until_signalled(server, lambda: print("cleaned up", flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_gracefully(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert process.stdout is not None
    try:
        assert '"event": "ready"' in process.stdout.readline()
        process.send_signal(number)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and "cleaned up" in rest
    finally:
        process.kill()
