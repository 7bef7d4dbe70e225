"""Settings of the coprocessor: environment variables with prefix TENSAFE_HE_LORA_, or the same as options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tensorguard.errors import ConfigurationError
from tensorguard.package.contract import DEFAULT_PRIVACY_BOUND_LOG2

PREFIX = "TENSAFE_HE_LORA_"
Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.\-]+):[0-9]{1,5}$")]


class HeLoraSettings(BaseSettings):
    """What the coprocessor can be told. Addresses are host:port; port 0 takes a free one. Lists are JSON."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_prog_name="python -m services.he_lora",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
    )

    packages: list[Path] = Field(min_length=1, description="sealed packages (.tssp) to serve, all of one tenant")
    publisher_keys: list[Path] = Field(
        min_length=1, description="public key files of the publishers whose packages are accepted"
    )
    tenant: str = Field(min_length=1, max_length=64, description="tenant whose adapters are served")
    attestor: Address = Field("127.0.0.1:7401", description="address of the tenant's attestor")
    attestor_thumbprint: str | None = Field(
        None, description="RFC 7638 thumbprint of the attestor's key; without it the first answer is believed"
    )
    simulated_root_key: Path | None = Field(
        None,
        description="private key file of the test root that signs simulated evidence (machine without a TEE)",
    )
    listen: Address = Field("127.0.0.1:7402", description="address of the gRPC server")
    metrics_listen: Address | None = Field(None, description="address of Prometheus metrics; none without")
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
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    plaintext_network: bool = Field(
        False, description="permit a non-loopback address without TLS, on a private container network"
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")


def load_settings(arguments: list[str]) -> HeLoraSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    known = {f"{PREFIX}{name}".upper() for name in HeLoraSettings.model_fields}
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise ConfigurationError(f"unknown environment variable {', '.join(unknown)}")
    try:
        return HeLoraSettings(_cli_parse_args=arguments)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        option = "--" + name.replace("_", "-")
        raise ConfigurationError(f"{option} (or {PREFIX}{name.upper()}): {first['msg']}") from None
