"""The gateway as an enrolled service: mutual TLS with the inference service, and what happens without."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from services.gateway import enrolled
from services.gateway.enrolled import GATEWAY, INFERENCE, inference_client
from services.gateway.server import running_gateway
from services.gateway.settings import GatewaySettings
from tensorguard.errors import ConfigurationError, PermissionDeniedError, UnavailableError
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.enrolment import EnrolledService
from tensorguard.rpc.authorisation import certified
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.tls import server_credentials
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import running_attestor
from tests.support.fake_inference import running_fake
from tests.support.tls import tls_identity

HOST = ServiceName("inference", "acme")


@dataclass
class Secured:
    """A running attestor with TLS, and a secret for one gateway."""

    address: str
    authority: Authority
    folder: Path

    def settings(self, inference: str, **changes: Any) -> GatewaySettings:
        values: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "inference": inference,
            "attestor": self.address,
            "attestor_authority": self.folder / "authority.pem",
            "tls_dir": self.folder / "tls",
            "enrolment_secret_file": self.folder / "secret",
        }
        return GatewaySettings(**{**values, **changes})

    @contextlib.asynccontextmanager
    async def inference(self, name: ServiceName = HOST) -> AsyncIterator[str]:
        """An inference service that serves certified gateways."""
        identity = tls_identity(self.authority, name)
        async with running_fake(certified("gateway"), server_credentials(lambda: identity)) as (_, address):
            yield address


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    state = initialise_development_state(tmp_path / "state", "acme")
    with AttestorState.open(state.state_dir) as opened:
        authority = opened.authority
        secret = tmp_path / "secret"
        secret.write_text(opened.enrol(GATEWAY, 60))
        secret.chmod(0o600)
    (tmp_path / "authority.pem").write_bytes(authority.pem)
    with running_attestor(state, tls=True) as address:
        yield Secured(address, authority, tmp_path)


async def models(settings: GatewaySettings) -> None:
    """Raises what the gateway's calls are answered with."""
    async with inference_client(settings, "") as client:
        await client.models()


async def test_an_enrolled_gateway_serves(secured: Secured) -> None:
    async with (
        secured.inference() as address,
        running_gateway(secured.settings(address)) as gateway,
        httpx.AsyncClient() as client,
    ):
        answer = await client.get(f"http://{gateway.http_address}/v1/models")
        assert answer.status_code == 200 and answer.json()["data"]


async def test_a_restart_needs_no_new_secret(secured: Secured) -> None:
    async with secured.inference() as address:
        await models(secured.settings(address))
        await models(secured.settings(address, enrolment_secret_file=None))


async def test_without_a_secret_it_does_not_start(secured: Secured) -> None:
    async with secured.inference() as address:
        with pytest.raises(ConfigurationError, match="tensafe attestor enrol"):
            await models(secured.settings(address, enrolment_secret_file=None))


async def test_without_tls_the_inference_service_is_not_reached(secured: Secured) -> None:
    off = {"attestor": None, "attestor_authority": None, "tls_dir": None}
    async with secured.inference() as address:
        with pytest.raises(UnavailableError):
            await models(secured.settings(address, **off))


async def test_plaintext_to_another_machine_has_to_be_permitted(tmp_path: Path) -> None:
    settings = GatewaySettings(inference="inference.example:7403")
    with pytest.raises(ConfigurationError, match=r"not a loopback address.*plaintext_network"):
        await models(settings)
    async with inference_client(settings.model_copy(update={"plaintext_network": True}), ""):
        pass


async def test_an_inference_service_without_tls_is_not_used(secured: Secured) -> None:
    async with running_fake() as (_, address):
        with pytest.raises(UnavailableError):
            await models(secured.settings(address))


@pytest.mark.parametrize(
    "name", [ServiceName("coprocessor", "acme"), ServiceName("attestor"), GATEWAY], ids=lambda name: name.role
)
async def test_another_service_is_not_taken_for_inference(secured: Secured, name: ServiceName) -> None:
    async with secured.inference(name) as address:
        with pytest.raises(UnavailableError):
            await models(secured.settings(address))


async def test_a_foreign_inference_service_is_not_used(secured: Secured) -> None:
    identity = tls_identity(Authority.generate(time.time()), HOST, trusts=secured.authority)
    async with running_fake(credentials=server_credentials(lambda: identity)) as (_, address):
        with pytest.raises(UnavailableError):
            await models(secured.settings(address))


async def test_attested_hosts_do_not_call_as_gateways(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    host = tls_identity(secured.authority, INFERENCE)
    monkeypatch.setattr(EnrolledService, "identity", lambda _: host)
    async with secured.inference() as address:
        with pytest.raises(PermissionDeniedError):
            await models(secured.settings(address))


async def test_a_renewed_certificate_gets_a_new_channel(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolled, "CHECK_SECONDS", 0.05)
    renew = asyncio.Event()
    refresh = EnrolledService.refresh

    def due(self: EnrolledService) -> bool:
        if renew.is_set():
            renew.clear()
            self._renew_at = 0.0
        return refresh(self)

    monkeypatch.setattr(EnrolledService, "refresh", due)
    async with secured.inference() as address, inference_client(secured.settings(address), "") as client:
        await client.models()
        first = client._channel
        renew.set()
        deadline = time.monotonic() + 10
        while client._channel is first:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        await client.models()


@pytest.mark.parametrize("missing", ["attestor", "attestor_authority", "tls_dir"])
def test_half_of_tls_is_refused(secured: Secured, missing: str) -> None:
    with pytest.raises(ValidationError, match="all three"):
        secured.settings("127.0.0.1:1", **{missing: None})
