"""Errors, headers and bounds on every path, over plain HTTP."""

from __future__ import annotations

import asyncio
import json

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.gateway.server import running_gateway
from services.gateway.settings import GatewaySettings
from tensorguard.errors import ConfigurationError
from tensorguard.rpc.generated.tensafe.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from tests.services.gateway.conftest import Start

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("PUT", CHAT, 405),
    ],
)
async def test_unknown_paths_and_methods_have_openai_errors(start: Start, method: str, path: str, status: int) -> None:
    async with start() as site, httpx.AsyncClient(base_url=site.url) as client:
        answer = await client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"model": 5}',
        b'{"model": ""}',
        b'{"model": "adapter", "temperature": NaN}',
        b'{"model": "\xff"}',
        b'\xef\xbb\xbf{"model": "adapter"}',
        '{"model": "adapter"}'.encode("utf-16"),
        b'{"model": "adapter", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_bad_bodies(start: Start, body: bytes) -> None:
    async with start() as site, httpx.AsyncClient(base_url=site.url) as client:
        headers = {"authorization": f"Bearer {site.key}", "content-type": "application/json"}
        answer = await client.post(CHAT, content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert site.fake.requests == []


async def test_a_large_body_is_refused_before_it_is_parsed(start: Start) -> None:
    async with start(max_body_bytes=2048) as site, httpx.AsyncClient(base_url=site.url) as client:
        headers = {"authorization": f"Bearer {site.key}", "content-type": "application/json"}
        answer = await client.post(CHAT, content=b"x" * 2049, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"

        async def chunks():
            for _ in range(5):
                yield b"y" * 1000

        answer = await client.post(CHAT, content=chunks(), headers=headers)  # no content-length
        assert answer.status_code == 413
        fits = json.dumps({"model": "adapter", "x": ""}).encode()
        fits = fits[:-2] + b"z" * (2048 - len(fits)) + fits[-2:]
        assert (await client.post(CHAT, content=fits, headers=headers)).status_code == 200


async def test_a_body_that_does_not_come(start: Start) -> None:
    async with start(body_timeout_seconds=0.1) as site:
        host, port = site.gateway.http_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.key}\r\n"
        writer.write((head + "Content-Type: application/json\r\nContent-Length: 10\r\n\r\n").encode())
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_a_declared_size_is_refused_without_waiting_for_the_body(start: Start) -> None:
    async with start(max_body_bytes=2048) as site:
        host, port = site.gateway.http_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.key}\r\n"
        writer.write((head + "Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n").encode())
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_other_content_types_are_refused(start: Start) -> None:
    async with start() as site, httpx.AsyncClient(base_url=site.url) as client:
        headers = {"authorization": f"Bearer {site.key}", "content-type": "text/plain"}
        answer = await client.post(CHAT, content=b'{"model": "adapter"}', headers=headers)
        assert answer.status_code == 415
        assert site.fake.requests == []


async def test_every_answer_has_a_fresh_request_id_and_the_evidence_kind(start: Start) -> None:
    async with start() as site, httpx.AsyncClient(base_url=site.url) as client:
        headers = {"authorization": f"Bearer {site.key}", "x-request-id": "chosen"}
        answers = [
            await client.get(path, headers=headers) for path in ("/health", "/v1/models", "/none", "/v1/models/none")
        ]
        ids = {answer.headers["x-request-id"] for answer in answers}
        assert len(ids) == len(answers) and "chosen" not in ids
        assert {answer.headers["x-tensafe-evidence"] for answer in answers} == {"simulated"}


async def test_mixed_evidence_is_shown_as_such(start: Start) -> None:
    async with start(status_seconds=0.001) as site, httpx.AsyncClient(base_url=site.url) as client:
        site.fake.evidence = "tdx"
        assert (await client.get("/health")).headers["x-tensafe-evidence"] == "simulated+tdx"


async def test_without_keys_only_local_names_are_answered(start: Start) -> None:
    site_of = start(authentication=False, anonymous_tenant="local")
    async with site_of as site, httpx.AsyncClient(base_url=site.url) as client:
        assert (await client.get("/v1/models")).status_code == 200
        answer = await client.get("/v1/models", headers={"host": "attacker.example"})
        assert answer.status_code == 403
        await client.post(CHAT, json={"model": "adapter"})
        assert site.fake.requests[0].tenant == "local"


async def test_no_keys_beyond_loopback_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no API keys"):
        async with running_gateway(GatewaySettings(listen="0.0.0.0:0", admin_listen="127.0.0.1:0")):
            pass


async def test_a_busy_port_is_a_clear_error(start: Start) -> None:
    async with start() as site:
        busy = GatewaySettings(listen=site.gateway.http_address, admin_listen="127.0.0.1:0")
        with pytest.raises(ConfigurationError, match="--listen"):
            async with running_gateway(busy):
                pass
        busy = GatewaySettings(listen="127.0.0.1:0", admin_listen=site.gateway.admin_address)
        with pytest.raises(ConfigurationError, match="--admin-listen"):
            async with running_gateway(busy):
                pass


async def test_operators_see_status_and_health(start: Start) -> None:
    async with start() as site, grpc.aio.insecure_channel(site.gateway.admin_address) as channel:
        status = await gateway_pb2_grpc.GatewayServiceStub(channel).GetStatus(gateway_pb2.GetStatusRequest())
        assert status.http_address == site.gateway.http_address
        assert status.authentication and status.inference_healthy
        assert list(status.models) == ["org/base", "adapter"]
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
