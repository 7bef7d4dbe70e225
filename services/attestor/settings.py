"""Settings of the attestor: environment variables with prefix TENSAFE_ATTESTOR_, or the same as options."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings

from tensorguard.settings import Address, load_service_settings, service_settings


class AttestorSettings(BaseSettings):
    """What the attestor can be told. Addresses are host:port; port 0 takes a free one."""

    model_config = service_settings("attestor")

    state_dir: Path = Field(description="directory of database, key-encryption key and audit head; mode 0700")
    database_url: SecretStr | None = Field(None, description="postgresql://... or sqlite:///...; default: in state_dir")
    key_encryption_key: str | None = Field(
        None, description="file:PATH, env:NAME or vault:https://HOST/MOUNT/KEY; default: the file kek in state_dir"
    )
    witnesses: list[Path] = Field([], description="further files that keep the newest audit head")
    policy_file: Path = Field(description="policy that evidence is appraised by (YAML or JSON)")
    listen: Address = Field("127.0.0.1:7401", description="address of the gRPC server")
    mutual_listen: Address | None = Field(
        None, description="second address, for callers that show a certificate; turns TLS on at both"
    )
    health_listen: Address | None = Field(
        None, description="plaintext address that answers health checks only, for probes without a certificate"
    )
    simulated_root_public_key: Path | None = Field(
        None, description="PEM Ed25519 key that signs simulated evidence; only for policies that name it"
    )
    endorsements_dir: Path | None = Field(
        None, description="directory of makers' certificates and collateral, one folder a kind; read, never fetched"
    )
    nonce_seconds: int = Field(60, ge=5, le=600, description="how long a challenge can be answered")
    requests_per_peer: float = Field(100, gt=0, description="requests a second that one host may make in the long run")
    requests: float = Field(1000, gt=0, description="requests a second that all hosts together may make")
    watchers: int = Field(64, ge=1, le=1024, description="workloads that may watch revocations at a time")
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    plaintext_network: bool = Field(
        False, description="permit a non-loopback address without TLS, on a private container network"
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")


def load_settings(arguments: list[str]) -> AttestorSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    return load_service_settings(AttestorSettings, arguments)
