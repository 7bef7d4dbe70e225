"""Runs the gateway: the HTTP server and the operators' gRPC server in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import structlog
import uvicorn

from services.gateway.admin import GatewayServicer, admin_service
from services.gateway.app import build_app
from services.gateway.enrolled import inference_client
from services.gateway.inference import EvidenceWatch
from services.gateway.keys import KeyStore
from services.gateway.settings import GatewaySettings, split_address
from tensorguard.errors import ConfigurationError
from tensorguard.rpc.options import is_loopback
from tensorguard.rpc.server import ServerOptions, build_async_server, serve_until_signalled_async

_log = structlog.get_logger(__name__)
_DRAIN_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Running:
    """Where a started gateway listens (host:port, with the port that was taken for 0)."""

    http_address: str
    admin_address: str


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigurationError for what cannot be started."""
    async with running_gateway(settings, until_signalled=True):
        pass


@contextlib.asynccontextmanager
async def running_gateway(settings: GatewaySettings, *, until_signalled: bool = False) -> AsyncIterator[Running]:
    """A started gateway, stopped at the end of the block, which with `until_signalled` is a signal."""
    host, port = split_address(settings.listen)
    keys = _keys(settings, host)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(_listener(host, port))
        http_address = _shown(host, listener.getsockname()[1])
        client = await stack.enter_async_context(inference_client(settings, _secret(settings)))
        evidence = EvidenceWatch(client, settings.status_seconds)
        http = _HttpServer(
            uvicorn.Config(
                build_app(settings, client, keys, evidence),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
            )
        )
        admin = build_async_server(
            [admin_service(GatewayServicer(client, http_address, keys is not None))],
            ServerOptions(
                address=settings.admin_listen,
                reflection=settings.reflection,
                listen_option="--admin-listen",
                plaintext_network=settings.plaintext_network,
            ),
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            while not http.started:
                if serving.done():
                    serving.result()
                    raise ConfigurationError(f"the HTTP server did not start on {http_address}")
                await asyncio.sleep(0.01)
            await admin.start()
            _log.info("serving", http_address=http_address, authentication="on" if keys else "off")
            yield Running(http_address, admin.address)
            if until_signalled:
                await serve_until_signalled_async(admin)
            else:
                await admin.stop()
        finally:
            http.should_exit = True
            await serving


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: one place decides when the process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _keys(settings: GatewaySettings, host: str) -> KeyStore | None:
    if settings.keys_file is not None:
        return KeyStore.load(settings.keys_file)
    if not is_loopback(host):
        raise ConfigurationError(
            f"--listen {settings.listen} can be reached from other machines, but no API keys are "
            "configured: give --keys-file (make one with python -m services.gateway.keys create), "
            "or listen on 127.0.0.1"
        )
    _log.warning("authentication off", detail="no key file; only this machine can reach the gateway")
    return None


def _secret(settings: GatewaySettings) -> str:
    if settings.inference_secret_file is None:
        return ""
    try:
        return settings.inference_secret_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the secret file {settings.inference_secret_file}: {error}") from error


def _listener(host: str, port: int) -> socket.socket:
    """Bind here, not in uvicorn, so that a busy port is one clear error and port 0 is known."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {_shown(host, port)} ({error.strerror}): choose another address with --listen"
        ) from error
    return listener


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
