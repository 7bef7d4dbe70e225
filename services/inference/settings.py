"""Settings of the inference service: environment variables with prefix TENSAFE_INFERENCE_, or the same as
options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from tensorguard.backends.vllm.config import (
    NAME_PATTERN,
    AdapterConnection,
    BaseNameAnswers,
    EngineOptions,
    check_engine_options,
)
from tensorguard.errors import ConfigurationError
from tensorguard.settings import Address, load_service_settings, service_settings


class InferenceSettings(BaseSettings):
    """What the inference service can be told. Addresses are host:port; port 0 takes a free one."""

    model_config = service_settings("inference")

    model: str = Field(min_length=1, description="folder of the base model, or its name on the Hugging Face hub")
    listen: Address = Field("127.0.0.1:7403", description="address of the gRPC server")
    adapters: tuple[AdapterConnection, ...] = Field(
        (),
        description="adapters to serve: JSON list of {name, coprocessor_endpoint, attestor_endpoint, ...}",
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

    served_model_name: str | None = Field(None, pattern=NAME_PATTERN, description="name of the base model for users")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="as vLLM's")
    max_model_len: int | None = Field(None, ge=16, description="as vLLM's")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="as vLLM's")
    kv_cache_gib: float | None = Field(None, gt=0, description="size of the KV cache (default on a CPU: 1)")
    max_num_seqs: int | None = Field(None, ge=1, description="as vLLM's")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="as vLLM's")
    tensor_parallel_size: int = Field(1, ge=1, description="as vLLM's; only 1 is supported yet")
    seed: int = Field(0, description="as vLLM's")
    enforce_eager: bool = Field(True, description="as vLLM's; needed with adapters")
    speculative_model: str | None = Field(None, description="not supported yet")
    tool_call_parser: str | None = Field(None, description="vLLM's parser of tool calls for this model")

    secret_file: Path | None = Field(
        None,
        description="file with the secret that callers must send (a gateway's inference_secret_file)",
    )
    plaintext_network: bool = Field(
        False, description="permit a non-loopback address without TLS, on a private container network"
    )
    reflection: bool = Field(False, description="offer gRPC reflection (development)")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")

    def engine_options(self) -> EngineOptions:
        """The part that concerns the base model's engine."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})


def load_settings(arguments: list[str]) -> InferenceSettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    settings = load_service_settings(InferenceSettings, arguments)
    check_engine_options(settings.engine_options(), adapters=bool(settings.adapters))
    if settings.base_name_answers == "adapter" and len(settings.adapters) != 1:
        raise ConfigurationError(f"base_name_answers=adapter needs exactly one adapter, not {len(settings.adapters)}")
    return settings
