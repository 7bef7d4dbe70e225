"""Settings of the inference service: environment variables with prefix TENSAFE_INFERENCE_, or the same as
options."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

from tensorguard.backends.vllm.config import SESSION_DEFAULTS, AdapterConnection, BaseNameAnswers
from tensorguard.backends.vllm.options import EngineOptions, check_engine_options
from tensorguard.errors import ConfigurationError
from tensorguard.session.shared_memory import MAX_BYTES, PAGE
from tensorguard.settings import Address, load_service_settings, service_settings


class InferenceSettings(EngineOptions, BaseSettings):
    """What the inference service can be told, besides the engine's own options. Addresses are host:port; port 0 takes a
    free one."""

    model_config = service_settings("inference")

    listen: Address = Field("127.0.0.1:7403", description="address of the gRPC server")
    adapters: tuple[AdapterConnection, ...] = Field(
        (),
        description="adapters to start with: JSON list of {name, coprocessor_endpoint, attestor_endpoint, ...}",
    )
    base_name_answers: BaseNameAnswers = Field(
        "base",
        description='what answers the base model\'s name: "base", or "adapter" where there is exactly one',
    )
    require_attestation: bool = Field(
        True, description="refuse simulated evidence; when off it is permitted, but never left out"
    )
    simulated_root_key: Path | None = Field(None, description="private key that signs this host's simulated evidence")
    delta_timeout_seconds: float = Field(30.0, gt=0, description="how long a forward pass waits for one delta")
    pool_bytes: int = Field(
        SESSION_DEFAULTS.pool_bytes,
        ge=0,
        description="bytes of encryptions of zero made ahead, in idle time, for each adapter's key; 0 makes none ahead",
    )
    shared_memory_bytes: int = Field(
        SESSION_DEFAULTS.shared_memory_bytes,
        ge=0,
        le=MAX_BYTES,
        multiple_of=PAGE,
        description="memory to share with each adapter's coprocessor on this machine, whole pages; 0 turns it off",
    )

    tool_call_parser: str | None = Field(None, description="vLLM's parser of tool calls for this model")

    secret_file: Path | None = Field(
        None,
        description="file with the secret that callers must send (a gateway's inference_secret_file)",
    )
    admin_secret_file: Path | None = Field(
        None,
        description="file with the secret of those who may attach and detach adapters; nobody may without",
    )
    attestor: Address | None = Field(None, description="attestor that certifies this service for its gateway")
    attestor_thumbprint: str | None = Field(None, description="thumbprint of its key, or several with commas")
    attestor_authority: Path | None = Field(
        None, description="certificate (PEM) of that attestor's authority; turns mutual TLS with the gateway on"
    )
    health_listen: Address | None = Field(
        None, description="plaintext address that answers health checks only, for probes without a certificate"
    )
    tenant: str | None = Field(None, description="tenant that this service attests for to be certified")
    plaintext_network: bool = Field(
        False,
        description="permit non-loopback addresses without TLS, own and others', on a private container network",
    )
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> InferenceSettings:
        given = (self.attestor, self.attestor_authority, self.tenant)
        if any(given) and not all(given):
            raise ValueError("TLS with the gateway needs attestor, attestor_authority and tenant, all three")
        return self

    def engine_options(self) -> EngineOptions:
        """The part that concerns the base model's engine."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})


def load_settings(arguments: list[str]) -> InferenceSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    settings = load_service_settings(InferenceSettings, arguments)
    check_engine_options(settings)
    if settings.base_name_answers == "adapter" and len(settings.adapters) != 1:
        raise ConfigurationError(f"base_name_answers=adapter needs exactly one adapter, not {len(settings.adapters)}")
    return settings
