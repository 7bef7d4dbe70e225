"""Settings of the gateway: environment variables TENSAFE_GATEWAY_NAME, or options --name."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

from tensorguard.errors import ConfigurationError
from tensorguard.settings import Address, load_service_settings, service_settings


class GatewaySettings(BaseSettings):
    """What the gateway can be told. Addresses are host:port; port 0 takes a free one."""

    model_config = service_settings("gateway")

    listen: Address = Field("127.0.0.1:8000", description="address of the OpenAI HTTP server")
    admin_listen: Address = Field("127.0.0.1:7404", description="address of the operators' gRPC server")
    inference: Address = Field("127.0.0.1:7403", description="address of the inference service")
    inference_secret_file: Path | None = Field(
        None, description="file with the secret that the inference service wants from the gateway"
    )
    attestor: Address | None = Field(None, description="attestor that certifies the gateway: its --listen")
    attestor_authority: Path | None = Field(
        None,
        description="certificate (PEM) of the attestor's authority; turns TLS with the inference service on",
    )
    tls_dir: Path | None = Field(None, description="directory of the gateway's TLS key and certificate; mode 0700")
    enrolment_secret_file: Path | None = Field(
        None, description="file with the secret of tensafe attestor enrol, for the first start"
    )
    plaintext_network: bool = Field(
        False, description="permit non-loopback addresses without TLS, on a private container network"
    )
    keys_file: Path | None = Field(None, description="API keys; without it only a loopback address is served")
    anonymous_tenant: str = Field("", description="tenant of callers when authentication is off")
    reflection: bool = Field(False, description="offer gRPC reflection on the operators' server (development)")
    max_body_bytes: int = Field(4 << 20, ge=1024, le=15 << 20, description="largest request body")
    request_timeout_seconds: float = Field(600.0, gt=0, description="longest time one request may take")
    body_timeout_seconds: float = Field(30.0, gt=0, description="longest time a client may take to send its body")
    status_seconds: float = Field(5.0, gt=0, description="how often the inference service is asked for its state")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewaySettings:
        given = (self.attestor, self.attestor_authority, self.tls_dir)
        if any(given) and not all(given):
            raise ValueError("TLS with the inference service needs attestor, attestor_authority and tls_dir, all three")
        return self


def load_settings(arguments: list[str]) -> GatewaySettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    return load_service_settings(GatewaySettings, arguments)


def split_address(address: str) -> tuple[str, int]:
    """Split host:port; an IPv6 host comes without its brackets. Raises ConfigurationError for a bad port."""
    host, _, port = address.rpartition(":")
    if int(port) > 65535:
        raise ConfigurationError(f"{address}: a port is at most 65535")
    return host.strip("[]"), int(port)
