"""Settings of the attestor: environment variables with prefix TENSAFE_ATTESTOR_, or the same as options."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings

from tensorguard.settings import Address, load_service_settings, service_settings


class AttestorSettings(BaseSettings):
    """What the attestor can be told. Addresses are host:port; port 0 takes a free one."""

    model_config = service_settings("attestor")

    state_dir: Path = Field(description="directory of keys, leases and the audit log; mode 0700")
    policy_file: Path = Field(description="policy that evidence is appraised by (YAML or JSON)")
    listen: Address = Field("127.0.0.1:7401", description="address of the gRPC server")
    simulated_root_public_key: Path | None = Field(
        None, description="PEM Ed25519 key that signs simulated evidence; only for policies that name it"
    )
    endorsements_dir: Path | None = Field(
        None, description="directory of makers' certificates and collateral, one folder a kind; read, never fetched"
    )
    nonce_seconds: int = Field(60, ge=5, le=600, description="how long a challenge can be answered")
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    plaintext_network: bool = Field(
        False, description="permit a non-loopback address without TLS, on a private container network"
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")


def load_settings(arguments: list[str]) -> AttestorSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    return load_service_settings(AttestorSettings, arguments)
