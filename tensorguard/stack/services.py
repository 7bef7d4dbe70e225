"""How each service is started on this machine; no other place knows their settings from outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensorguard.evidence.development import DevelopmentState
from tensorguard.stack.ports import free_port
from tensorguard.stack.process import ServiceSpec
from tensorguard.stack.settings import StackSettings

LOOPBACK = "127.0.0.1"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class PackagedAdapter:
    """A sealed adapter: its model name, its package, and who must have signed it (public key files)."""

    name: str
    package: Path
    tenant: str
    digest: str
    publisher_keys: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The base model, and names and values of engine settings that are not the launcher's."""

    model: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a stack with TLS needs: the authority's certificate, the gateway's secret, where it keeps key and
    certificate."""

    authority: Path
    enrolment_secret: Path
    gateway_dir: Path


def attestor_spec(
    settings: StackSettings, port: int, state: DevelopmentState, tls: TlsFiles | None = None
) -> ServiceSpec:
    """The attestor of a development stack: its policy accepts simulated evidence, and says so."""
    address, health = f"{LOOPBACK}:{port}", _health_address(tls)
    secured = {} if tls is None else {"MUTUAL_LISTEN": f"{LOOPBACK}:0", "HEALTH_LISTEN": health}
    return ServiceSpec(
        "attestor",
        (sys.executable, "-m", "services.attestor"),
        address,
        environment={
            "TENSAFE_ATTESTOR_LISTEN": address,
            "TENSAFE_ATTESTOR_STATE_DIR": str(state.state_dir),
            "TENSAFE_ATTESTOR_POLICY_FILE": str(state.policy_file),
            "TENSAFE_ATTESTOR_SIMULATED_ROOT_PUBLIC_KEY": str(state.simulated_root_public_key),
            "TENSAFE_ATTESTOR_REFLECTION": _flag(settings.reflection),
            **_prefixed("ATTESTOR", secured),
        },
        health_address=health,
        start_seconds=settings.start_seconds,
    )


def coprocessor_spec(
    settings: StackSettings,
    port: int,
    state: DevelopmentState,
    attestor: str,
    adapters: Sequence[PackagedAdapter],
    tls: TlsFiles | None = None,
) -> ServiceSpec:
    """The HE-LoRA coprocessor with the packages of one tenant's adapters."""
    publishers = sorted({str(path) for adapter in adapters for path in adapter.publisher_keys})
    address, health = f"{LOOPBACK}:{port}", _health_address(tls)
    secured = {} if tls is None else {"ATTESTOR_AUTHORITY": str(tls.authority), "HEALTH_LISTEN": health}
    return ServiceSpec(
        "he_lora",
        (str(settings.coprocessor_python), "-m", "services.he_lora"),
        address,
        environment={
            "TENSAFE_HE_LORA_LISTEN": address,
            "TENSAFE_HE_LORA_PACKAGES": json.dumps([str(adapter.package) for adapter in adapters]),
            "TENSAFE_HE_LORA_PUBLISHER_KEYS": json.dumps(publishers),
            "TENSAFE_HE_LORA_TENANT": adapters[0].tenant,
            "TENSAFE_HE_LORA_ATTESTOR": attestor,
            "TENSAFE_HE_LORA_ATTESTOR_THUMBPRINT": state.attestor_thumbprint,
            "TENSAFE_HE_LORA_SIMULATED_ROOT_KEY": str(state.simulated_root_key),
            "TENSAFE_HE_LORA_REFLECTION": _flag(settings.reflection),
            **_prefixed("HE_LORA", secured),
        },
        health_address=health,
        start_seconds=settings.start_seconds,
    )


def inference_spec(
    settings: StackSettings,
    port: int,
    state: DevelopmentState,
    attestor: str,
    coprocessor: str,
    adapters: Sequence[PackagedAdapter],
    engine: EngineChoice,
    secret_file: Path | None,
    tls: TlsFiles | None = None,
) -> ServiceSpec:
    """vLLM with the hooks. With `secret_file`, only callers that send its secret are answered."""
    address, health = f"{LOOPBACK}:{port}", _health_address(tls)
    secured = {}
    if tls is not None:
        secured = {
            "ATTESTOR": attestor,
            "ATTESTOR_THUMBPRINT": state.attestor_thumbprint,
            "ATTESTOR_AUTHORITY": str(tls.authority),
            "TENANT": adapters[0].tenant,
            "HEALTH_LISTEN": health,
        }
    connections = [
        {
            "name": adapter.name,
            "coprocessor_endpoint": coprocessor,
            "attestor_endpoint": attestor,
            "attestor_thumbprint": state.attestor_thumbprint,
            "tenant": adapter.tenant,
            "publisher_keys": [str(path) for path in adapter.publisher_keys],
            "expected_digest": adapter.digest,
            **({} if tls is None else {"attestor_authority": str(tls.authority)}),
        }
        for adapter in adapters
    ]
    options = {f"TENSAFE_INFERENCE_{name.upper()}": value for name, value in engine.options.items()}
    return ServiceSpec(
        "inference",
        (sys.executable, "-m", "services.inference"),
        address,
        environment={
            **_OFFLINE,
            "TENSAFE_INFERENCE_LISTEN": address,
            "TENSAFE_INFERENCE_MODEL": engine.model,
            "TENSAFE_INFERENCE_ADAPTERS": json.dumps(connections),
            "TENSAFE_INFERENCE_REQUIRE_ATTESTATION": "false",
            "TENSAFE_INFERENCE_SIMULATED_ROOT_KEY": str(state.simulated_root_key),
            "TENSAFE_INFERENCE_REFLECTION": _flag(settings.reflection),
            **({} if secret_file is None else {"TENSAFE_INFERENCE_SECRET_FILE": str(secret_file)}),
            **_prefixed("INFERENCE", secured),
            **options,
        },
        health_address=health,
        start_seconds=settings.start_seconds,
        stop_seconds=30.0,
    )


def gateway_spec(
    settings: StackSettings,
    port: int,
    admin_port: int,
    inference: str,
    keys_file: Path | None,
    secret_file: Path | None,
    attestor: str = "",
    tls: TlsFiles | None = None,
) -> ServiceSpec:
    """The OpenAI server. Its health says whether requests can be answered: it follows inference."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    environment = {
        "TENSAFE_GATEWAY_LISTEN": f"{host}:{port}",
        "TENSAFE_GATEWAY_ADMIN_LISTEN": f"{LOOPBACK}:{admin_port}",
        "TENSAFE_GATEWAY_INFERENCE": inference,
        "TENSAFE_GATEWAY_REFLECTION": _flag(settings.reflection),
    }
    if keys_file is not None:
        environment["TENSAFE_GATEWAY_KEYS_FILE"] = str(keys_file)
    if secret_file is not None:
        environment["TENSAFE_GATEWAY_INFERENCE_SECRET_FILE"] = str(secret_file)
    if tls is not None:
        secured = {
            "ATTESTOR": attestor,
            "ATTESTOR_AUTHORITY": str(tls.authority),
            "TLS_DIR": str(tls.gateway_dir),
            "ENROLMENT_SECRET_FILE": str(tls.enrolment_secret),
        }
        environment |= _prefixed("GATEWAY", secured)
    reachable = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(settings.host, host)  # noqa: S104
    return ServiceSpec(
        "gateway",
        (sys.executable, "-m", "services.gateway"),
        f"{reachable}:{port}",
        environment=environment,
        health_path="/health",
        start_seconds=settings.start_seconds,
    )


def _health_address(tls: TlsFiles | None) -> str:
    """Of a service that wants certificates of all others who call."""
    return "" if tls is None else f"{LOOPBACK}:{free_port(LOOPBACK)}"


def _prefixed(service: str, options: Mapping[str, str]) -> dict[str, str]:
    return {f"TENSAFE_{service}_{name}": value for name, value in options.items()}


def _flag(value: bool) -> str:
    return "true" if value else "false"
