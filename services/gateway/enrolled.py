"""The gateway's certificate, and the channel to the inference service that is made with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio
import structlog

from services.gateway.inference import InferenceClient
from services.gateway.settings import GatewaySettings
from tensorguard.errors import TenSafeError
from tensorguard.evidence.enrolment import EnrolledService
from tensorguard.rpc.certificates import ServiceName
from tensorguard.rpc.channel import open_async_channel
from tensorguard.rpc.tls import ChannelTls

log = structlog.get_logger(__name__)

GATEWAY, INFERENCE = ServiceName("gateway"), ServiceName("inference")
CHECK_SECONDS = 60.0


@contextlib.asynccontextmanager
async def inference_client(settings: GatewaySettings, secret: str) -> AsyncIterator[InferenceClient]:
    """A client of the inference service, over mutual TLS where the settings have it. In the block its channel is made
    anew whenever the certificate was renewed; calls that run finish on the old one.

    Raises what enrolling does: without a certificate the gateway does not start. ConfigurationError for plaintext to
    another machine that the settings do not permit.
    """
    enrolled = _enrolled(settings)
    if enrolled is not None:
        await asyncio.to_thread(enrolled.refresh)
    channel = await _open(settings, enrolled)
    client = InferenceClient(channel, settings.inference, secret)
    keeper = None if enrolled is None else asyncio.create_task(_keep(client, enrolled, settings))
    try:
        yield client
    finally:
        if keeper is not None:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        await client.close()


async def _keep(client: InferenceClient, enrolled: EnrolledService, settings: GatewaySettings) -> None:
    closing: set[asyncio.Task[None]] = set()
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        try:
            if await asyncio.to_thread(enrolled.refresh):
                old = client.use(await _open(settings, enrolled))
                task = asyncio.create_task(old.close(settings.request_timeout_seconds))
                closing.add(task)
                task.add_done_callback(closing.discard)
        except TenSafeError as error:
            log.warning("certificate not renewed", reason=error.reason, cause=error.message)
        except Exception as error:  # the task must live: without it nobody can connect any more
            log.error("certificate keeper failed", error_type=type(error).__name__)


def _enrolled(settings: GatewaySettings) -> EnrolledService | None:
    if settings.attestor is None or settings.attestor_authority is None or settings.tls_dir is None:
        return None
    return EnrolledService(
        GATEWAY, settings.attestor, settings.attestor_authority, settings.tls_dir, settings.enrolment_secret_file
    )


async def _open(settings: GatewaySettings, enrolled: EnrolledService | None) -> grpc.aio.Channel:
    """As the gateway, to an attested inference host of any tenant."""
    tls = None if enrolled is None else ChannelTls(enrolled.tls.authority, INFERENCE, enrolled.identity())
    return await open_async_channel(settings.inference, tls=tls, plaintext_network=settings.plaintext_network)
