"""Settings of the attestor: environment variables with prefix TENSAFE_ATTESTOR_, or the same as options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tensorguard.errors import ConfigurationError

PREFIX = "TENSAFE_ATTESTOR_"
Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.\-]+):[0-9]{1,5}$")]


class AttestorSettings(BaseSettings):
    """What the attestor can be told. Addresses are host:port; port 0 takes a free one."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_prog_name="python -m services.attestor",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
    )

    state_dir: Path = Field(description="directory of keys, leases and the audit log; mode 0700")
    policy_file: Path = Field(description="policy that evidence is appraised by (YAML or JSON)")
    listen: Address = Field("127.0.0.1:7401", description="address of the gRPC server")
    simulated_root_public_key: Path | None = Field(
        None, description="PEM Ed25519 key that signs simulated evidence; only for policies that name it"
    )
    nonce_seconds: int = Field(60, ge=5, le=600, description="how long a challenge can be answered")
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    plaintext_network: bool = Field(
        False, description="permit a non-loopback address without TLS, on a private container network"
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")


def load_settings(arguments: list[str]) -> AttestorSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    known = {f"{PREFIX}{name}".upper() for name in AttestorSettings.model_fields}
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise ConfigurationError(f"unknown environment variable {', '.join(unknown)}")
    try:
        return AttestorSettings(_cli_parse_args=arguments)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        option = "--" + name.replace("_", "-")
        raise ConfigurationError(f"{option} (or {PREFIX}{name.upper()}): {first['msg']}") from None
