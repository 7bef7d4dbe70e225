"""The one place that builds gRPC servers, synchronous (`build_server`) and asyncio (`build_async_server`).

service = Service(pb2.DESCRIPTOR.services_by_name["AttestorService"], servicer, {"GetKeys": PUBLIC, ...})
server = build_server([service], ServerOptions(address="127.0.0.1:7403"))
server.start()
serve_until_signalled(server)
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tensorguard.errors import ConfigurationError
from tensorguard.rpc.authorisation import Rule, method_table
from tensorguard.rpc.guard import AsyncGuard, SyncGuard
from tensorguard.rpc.options import DEFAULT_MESSAGE_BYTES, is_loopback, server_options

log = structlog.get_logger(__name__)

_HEALTH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Codec:
    """Replaces a method's protobuf (de)serialisers; must produce and accept exactly the protobuf bytes."""

    parse_request: Callable[[bytes], Any]
    serialise_response: Callable[[Any], bytes]


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer with its authorisation table: exactly the methods of `descriptor` have a rule."""

    descriptor: ServiceDescriptor
    servicer: object
    rules: Mapping[str, Rule]
    codecs: Mapping[str, Codec] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listener:
    """A further address of a server."""

    address: str
    credentials: grpc.ServerCredentials
    listen_option: str


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to serve.

    address: "host:port" (port 0 takes a free one) or "unix:/path".
    workers: threads of a synchronous server; each open stream holds one.
    reflection: lists and describes the services to anyone who asks; for development.
    listen_option: what the user sets to choose another address, named in errors.
    plaintext_network: permits other than loopback addresses without TLS, for private container networks.
    credentials: TLS (`tensorguard.rpc.tls.server_credentials`); plaintext without.
    further: a second address of the same services with credentials of its own. A rule sees which one a caller used by
        whether there is a certificate.
    health_address: a plaintext address that answers health checks and nothing else, for probes that have no
        certificate; it may be any, since all it tells is whether the server serves.
    """

    address: str
    workers: int = 16
    message_bytes: int = DEFAULT_MESSAGE_BYTES
    reflection: bool = False
    credentials: grpc.ServerCredentials | None = None
    listen_option: str = "--listen"
    plaintext_network: bool = False
    further: Listener | None = None
    health_address: str = ""


@dataclass(frozen=True, slots=True)
class HealthChecks:
    """The server behind `health_address`, of the same kind as the one that it tells about."""

    server: Any
    address: str


class Server:
    """A synchronous server with its health service."""

    def __init__(
        self,
        server: grpc.Server,
        address: str,
        status: health.HealthServicer,
        names: list[str],
        further_address: str = "",
        checks: HealthChecks | None = None,
    ) -> None:
        self._server, self.address, self._health, self._names = server, address, status, names
        self.further_address = further_address
        self._checks = checks

    @property
    def health_address(self) -> str:
        """Where health checks need no certificate; empty where there is no such address."""
        return "" if self._checks is None else self._checks.address

    def start(self) -> None:
        """Begin to serve and report SERVING."""
        self._server.start()
        if self._checks is not None:
            self._checks.server.start()
        self.set_serving(True)

    def set_serving(self, serving: bool) -> None:
        """What the health service says about the server and each of its services."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            self._health.set(name, state)

    def stop(self, grace: float = 2.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then cancel them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        if self._checks is not None:
            self._checks.server.stop(0).wait()


class AsyncServer:
    """An asyncio server with its health service."""

    def __init__(
        self,
        server: grpc.aio.Server,
        address: str,
        status: Any,
        names: list[str],
        further_address: str = "",
        checks: HealthChecks | None = None,
    ) -> None:
        self._server, self.address, self._health, self._names = server, address, status, names
        self.further_address = further_address
        self._checks = checks

    @property
    def health_address(self) -> str:
        """Where health checks need no certificate; empty where there is no such address."""
        return "" if self._checks is None else self._checks.address

    async def start(self) -> None:
        """Begin to serve and report SERVING."""
        await self._server.start()
        if self._checks is not None:
            await self._checks.server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What the health service says about the server and each of its services."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            await self._health.set(name, state)

    async def stop(self, grace: float = 2.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        if self._checks is not None:
            await self._checks.server.stop(0)


def build_server(services: Sequence[Service], options: ServerOptions) -> Server:
    """A synchronous server, bound to its port but not started. Raises ConfigurationError."""
    table = _table(services)
    server = grpc.server(
        ThreadPoolExecutor(options.workers, thread_name_prefix="rpc"),
        interceptors=[SyncGuard(table)],
        options=server_options(options.message_bytes),
    )
    # A Watch call must not hold one of the workers for as long as its caller likes.
    status = health.HealthServicer(
        experimental_non_blocking=True,
        experimental_thread_pool=ThreadPoolExecutor(1, thread_name_prefix="health"),
    )
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    names = _add_services(server, services, options)
    address, further = _bind(server, options), _bind_further(server, options)
    checks = _health_checks(partial(grpc.server, ThreadPoolExecutor(1, thread_name_prefix="probe")), status, options)
    return Server(server, address, status, names, further, checks)


def build_async_server(services: Sequence[Service], options: ServerOptions) -> AsyncServer:
    """An asyncio server, bound, not started; call it inside the running loop. Raises ConfigurationError."""
    table = _table(services)
    server = grpc.aio.server(interceptors=[AsyncGuard(table)], options=server_options(options.message_bytes))
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    names = _add_services(server, services, options)
    address, further = _bind(server, options), _bind_further(server, options)
    return AsyncServer(server, address, status, names, further, _health_checks(grpc.aio.server, status, options))


def serve_until_signalled(server: Server, on_stop: Callable[[], None] = lambda: None, grace: float = 2.0) -> None:
    """Log `ready`, wait for SIGTERM or SIGINT, stop gracefully. Call in the main thread, server started."""
    stopped = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        log.info("ready", address=server.address)
        stopped.wait()
        log.info("stopping")
        server.stop(grace)
        on_stop()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


async def serve_until_signalled_async(
    server: AsyncServer, on_stop: Callable[[], Awaitable[None]] | None = None, grace: float = 2.0
) -> None:
    """The same for an asyncio server that has been started in the running loop."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        log.info("ready", address=server.address)
        await stopped.wait()
        log.info("stopping")
        await server.stop(grace)
        if on_stop is not None:
            await on_stop()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _table(services: Sequence[Service]) -> dict[str, Rule]:
    table: dict[str, Rule] = {}
    for service in services:
        table.update(method_table(service.descriptor, service.rules))
        if unknown := sorted(service.codecs.keys() - service.rules.keys()):
            raise ConfigurationError(f"{service.descriptor.full_name} has no method {', '.join(unknown)}")
    return table


def _add_services(server: Any, services: Sequence[Service], options: ServerOptions) -> list[str]:
    for service in services:
        name = service.descriptor.full_name
        handlers = {method.name: _handler(service, method) for method in service.descriptor.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        server.add_registered_method_handlers(name, handlers)
    names = [service.descriptor.full_name for service in services]
    if options.reflection:
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return names


def _handler(service: Service, method: MethodDescriptor) -> Any:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    behaviour = getattr(service.servicer, method.name, None)
    if behaviour is None:
        raise ConfigurationError(f"{type(service.servicer).__name__} does not implement {method.full_name}")
    if codec := service.codecs.get(method.name):
        parse, serialise = codec.parse_request, codec.serialise_response
    else:
        parse = message_factory.GetMessageClass(method.input_type).FromString
        serialise = message_factory.GetMessageClass(method.output_type).SerializeToString
    make: Any = makers[method.client_streaming, method.server_streaming]
    return make(behaviour, parse, serialise)


def _health_checks(make: Callable[..., Any], status: Any, options: ServerOptions) -> HealthChecks | None:
    """Bind the address for health checks, if there is one."""
    if not options.health_address:
        return None
    server = make(options=server_options(_HEALTH_BYTES))
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    where = replace(
        options,
        address=options.health_address,
        credentials=None,
        listen_option="--health-listen",
        plaintext_network=True,
    )
    return HealthChecks(server, _bind(server, where))


def _bind_further(server: Any, options: ServerOptions) -> str:
    """Bind the further address, if there is one; what clients use, else an empty text."""
    more = options.further
    if more is None:
        return ""
    option = more.listen_option
    return _bind(server, replace(options, address=more.address, credentials=more.credentials, listen_option=option))


def _bind(server: Any, options: ServerOptions) -> str:
    """Bind the port; the address clients use, with the port that was taken for port 0."""
    address = options.address
    is_unix = address.startswith("unix:")
    host, _, port = address.rpartition(":")
    if not is_unix:
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigurationError(f"{options.listen_option}: {address!r} is not host:port")
        if options.credentials is None and not options.plaintext_network and not is_loopback(host):
            raise ConfigurationError(
                f"{options.listen_option}: {address} is not a loopback address and TLS is not configured; "
                "listen on 127.0.0.1, or permit plaintext on a private network explicitly (plaintext_network)"
            )
        if problem := _why_not_bound(host.strip("[]"), int(port)):
            raise ConfigurationError(f"{problem}: choose another with {options.listen_option}")
    try:
        if options.credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, options.credentials)
    except RuntimeError:
        raise ConfigurationError(f"cannot listen on {address}: choose another with {options.listen_option}") from None
    return address if is_unix else f"{host}:{bound}"


def _why_not_bound(host: str, port: int) -> str | None:
    """Asked before gRPC binds: it prints its own lines to stderr and does not say why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} is in use"
            return f"cannot listen on {host}:{port} ({error.strerror})"
    return None
