"""Puts the gRPC server together from settings and a running engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from services.inference.servicer import InferenceServicer, rules
from services.inference.settings import InferenceSettings
from tensorguard.backends.vllm.connect import host_platform
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.tls import CertificateKeeper, CertifiedKey
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2
from tensorguard.rpc.server import AsyncServer, ServerOptions, Service, build_async_server
from tensorguard.rpc.tls import server_credentials

MESSAGE_BYTES = 16 << 20


@contextlib.contextmanager
def certified_host(settings: InferenceSettings) -> Iterator[CertifiedKey | None]:
    """This host's TLS key with the certificate that attesting brings, renewed in the block; None without TLS.

    Raises what attesting does.
    """
    if settings.attestor is None or settings.attestor_authority is None or settings.tenant is None:
        yield None
        return
    tls = CertifiedKey.read(settings.attestor_authority)
    client = AttestorClient(settings.attestor, thumbprint=settings.attestor_thumbprint, tls=tls)
    try:
        platform = host_platform(settings)
        workload = Workload(client, WorkloadIdentity.generate(), platform, role=Role.INFERENCE, tenant=settings.tenant)
        workload.token()
        keeper = CertificateKeeper(workload.token)
        keeper.start()
        try:
            yield tls
        finally:
            keeper.stop()
    finally:
        client.close()


def build_inference_server(
    settings: InferenceSettings, core: EngineCore, tls: CertifiedKey | None = None
) -> AsyncServer:
    """Bound, not started. Raises ConfigurationError for a bad address or secret."""
    servicer = InferenceServicer(
        core, base_name_answers=settings.base_name_answers, tool_parser=settings.tool_call_parser
    )
    service = Service(
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        servicer,
        rules(read_secret(settings.secret_file), read_secret(settings.admin_secret_file), tls=tls is not None),
    )
    options = ServerOptions(
        settings.listen,
        message_bytes=MESSAGE_BYTES,
        reflection=settings.reflection,
        plaintext_network=settings.plaintext_network,
        credentials=None if tls is None else server_credentials(tls.identity),
        health_address=settings.health_listen or "",
    )
    return build_async_server([service], options)


def read_secret(path: Path | None) -> str | None:
    """The secret in a file, without surrounding white space."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"secret file {path}: {error.strerror}") from None
