"""Settings of the coprocessor: environment variables with prefix TENSAFE_HE_LORA_, or the same as options."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings

from tensorguard.engines import BACKENDS
from tensorguard.package.contract import DEFAULT_PRIVACY_BOUND_LOG2
from tensorguard.session.shared_memory import MAX_BYTES
from tensorguard.settings import Address, load_service_settings, service_settings


class HeLoraSettings(BaseSettings):
    """What the coprocessor can be told. Addresses are host:port; port 0 takes a free one. Lists are JSON."""

    model_config = service_settings("he_lora")

    packages: list[Path] = Field(min_length=1, description="sealed packages (.tssp) to serve, all of one tenant")
    publisher_keys: list[Path] = Field(
        min_length=1, description="public key files of the publishers whose packages are accepted"
    )
    opened_releases_file: Path | None = Field(
        None,
        description="file that remembers the newest release of each package that was opened, so that an older one is "
        "refused after a restart, too; without it only while the process runs",
    )
    tenant: str = Field(min_length=1, max_length=64, description="tenant whose adapters are served")
    backend: str = Field(
        "cpu",
        pattern=f"^({'|'.join(BACKENDS)})$",
        description="engine that evaluates: cpu or openfhe (docs/engines.md)",
    )
    attestor: Address = Field("127.0.0.1:7401", description="address of the tenant's attestor")
    attestor_thumbprint: str | None = Field(
        None,
        description="RFC 7638 thumbprint of the attestor's key, or several with commas; without it any is believed",
    )
    attestor_authority: Path | None = Field(
        None,
        description="certificate (PEM) of the attestor's authority; turns TLS on, towards the attestor and for hosts",
    )
    simulated_root_key: Path | None = Field(
        None,
        description="private key file of the test root that signs simulated evidence (machine without a TEE)",
    )
    listen: Address = Field("127.0.0.1:7402", description="address of the gRPC server")
    health_listen: Address | None = Field(
        None, description="plaintext address that answers health checks only, for probes without a certificate"
    )
    metrics_listen: Address | None = Field(None, description="address of Prometheus metrics; none without")
    shared_memory_bytes: int = Field(
        64 << 20,
        ge=0,
        le=MAX_BYTES,
        description="most memory to share with one session of a host on this machine; 0 turns it off",
    )
    tokens_per_lease: int = Field(
        20_000,
        ge=1,
        description="tokens to ask the attestor for at a time; what a process does not use is not given back",
    )
    privacy_bound_log2: int = Field(
        DEFAULT_PRIVACY_BOUND_LOG2,
        ge=-256,
        le=0,
        description="largest accepted log2 of the statistical distance of a package's responses",
    )
    max_sessions: int = Field(32, ge=1, le=1024, description="open sessions at a time; each holds a thread")
    session_idle_seconds: float = Field(
        900.0, gt=0, description="a session without a stream is dropped after this time"
    )
    session_life_seconds: float = Field(
        7200.0, gt=0, description="a session ends after this time; the host then attests again"
    )
    threads: int = Field(1, ge=1, le=64, description="threads that share the evaluation of one request")
    pool_bytes_per_key: int = Field(
        32 << 20,
        ge=0,
        description="bytes of encryptions of zero made ahead, in idle time, for each host key; 0 makes none ahead",
    )
    pool_bytes: int = Field(
        256 << 20, ge=0, description="bytes of encryptions of zero made ahead, over the keys of all sessions"
    )
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    plaintext_network: bool = Field(
        False,
        description="permit non-loopback addresses without TLS, own and others', on a private container network",
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")


def load_settings(arguments: list[str]) -> HeLoraSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    return load_service_settings(HeLoraSettings, arguments)
