"""The container check: healthy, not healthy, and a port that wants certificates."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
import time

import grpc
import pytest

from tensorguard.errors import UnavailableError
from tensorguard.rpc import probe
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.server import ServerOptions, Service, build_async_server, build_server
from tensorguard.rpc.tls import server_credentials
from tests.rpc.echo import DESCRIPTOR, AsyncEcho, Echo, rules
from tests.support.tls import tls_identity

IDENTITY = tls_identity(Authority.generate(time.time()), ServiceName("coprocessor", "acme"))


def mutual() -> ServerOptions:
    return ServerOptions(
        "127.0.0.1:0", credentials=server_credentials(lambda: IDENTITY), health_address="127.0.0.1:0", workers=2
    )


def probed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says; nothing where it finds the service healthy."""
    monkeypatch.setattr(sys, "argv", ["probe", *arguments])
    capsys.readouterr()
    code = probe.main()
    errors = capsys.readouterr().err
    assert code == (1 if errors else 0)
    return errors


def test_a_plaintext_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = build_server([Service(DESCRIPTOR, Echo(), rules())], ServerOptions("127.0.0.1:0", workers=2))
    assert server.health_address == ""
    server.start()
    assert probed(monkeypatch, capsys, server.address) == ""
    server.set_serving(False)
    assert "does not serve" in probed(monkeypatch, capsys, server.address)
    server.stop(0)
    assert "no service answers" in probed(monkeypatch, capsys, server.address)


def test_a_server_that_wants_certificates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = build_server([Service(DESCRIPTOR, Echo(), rules())], mutual())
    server.start()
    try:
        assert "health_listen" in probed(monkeypatch, capsys, server.address)
        assert probed(monkeypatch, capsys, server.health_address) == ""
        server.set_serving(False)
        assert "does not serve" in probed(monkeypatch, capsys, server.health_address)
        with open_channel(server.health_address) as channel, pytest.raises(grpc.RpcError) as caught:
            he_lora_pb2_grpc.HeLoraServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    finally:
        server.stop(0)
    assert "no service answers" in probed(monkeypatch, capsys, server.health_address)


async def test_an_asyncio_server_that_wants_certificates() -> None:
    server = build_async_server([Service(DESCRIPTOR, AsyncEcho(), rules())], mutual())
    await server.start()
    try:
        await asyncio.to_thread(probe.check_grpc, server.health_address)
        with pytest.raises(UnavailableError, match="health_listen"):
            await asyncio.to_thread(probe.check_grpc, server.address)
    finally:
        await server.stop(0)


def test_http(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert probed(monkeypatch, capsys, "--http", f"{url}/health") == ""
        assert "503" in probed(monkeypatch, capsys, "--http", f"{url}/other")
        assert "begins with http" in probed(monkeypatch, capsys, "--http", "file:///etc/passwd")
        server.shutdown()
