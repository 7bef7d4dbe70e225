"""Settings of the launcher: environment variables TENSAFE_STACK_NAME. Command lines offer them as options."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tensorguard.settings import load


class StackSettings(BaseSettings):
    """Where the services of one machine listen and keep their state. Port 0 takes a free one."""

    model_config = SettingsConfigDict(env_prefix="TENSAFE_STACK_", extra="forbid", frozen=True)

    state_dir: Path = Path(".state")
    """Logs, keys of the gateway, and below `attestor/` the attestor's state."""
    attestor_state_dir: Path | None = None
    """The attestor's state directory, where it is another."""
    host: str = "127.0.0.1"
    """Address of the OpenAI server. The other services only listen on loopback."""
    port: int = Field(8000, ge=0, le=65535)
    attestor_port: int = Field(7401, ge=0, le=65535)
    coprocessor_port: int = Field(7402, ge=0, le=65535)
    inference_port: int = Field(7403, ge=0, le=65535)
    gateway_admin_port: int = Field(7404, ge=0, le=65535)
    coprocessor_python: Path = Path(sys.executable)
    """Interpreter of the coprocessor, where its backend needs an environment of its own."""
    start_seconds: float = Field(600.0, gt=0)
    """How long a service may take to become healthy."""
    tls: bool = False
    """Mutual TLS between the services, with certificates of the attestor's authority."""
    reflection: bool = True
    """Offer gRPC reflection: this launcher is for development on one machine."""

    @property
    def attestor_state(self) -> Path:
        return self.attestor_state_dir or self.state_dir / "attestor"

    @property
    def logs(self) -> Path:
        return self.state_dir / "logs"


def load_stack_settings(**options: object) -> StackSettings:
    """Settings from the environment; `options` that are not None win. Raises ConfigurationError."""
    return load(StackSettings, **{name: value for name, value in options.items() if value is not None})
