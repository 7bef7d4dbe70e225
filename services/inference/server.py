"""Puts the gRPC server together from settings and a running engine."""

from __future__ import annotations

from pathlib import Path

from services.inference.servicer import InferenceServicer, rules
from services.inference.settings import InferenceSettings
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import ConfigurationError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2
from tensorguard.rpc.server import AsyncServer, ServerOptions, Service, build_async_server

MESSAGE_BYTES = 16 << 20


def build_inference_server(settings: InferenceSettings, core: EngineCore) -> AsyncServer:
    """Bound, not started. Raises ConfigurationError for a bad address or secret."""
    servicer = InferenceServicer(
        core, base_name_answers=settings.base_name_answers, tool_parser=settings.tool_call_parser
    )
    service = Service(
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        servicer,
        rules(read_secret(settings.secret_file), read_secret(settings.admin_secret_file)),
    )
    options = ServerOptions(
        settings.listen,
        message_bytes=MESSAGE_BYTES,
        reflection=settings.reflection,
        plaintext_network=settings.plaintext_network,
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
