"""Starts all services of one machine, or only attestor and coprocessor for an engine in this process."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorguard.crypto.files import write_secret_file
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.rpc.certificates import ServiceName
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.ports import free_port, require_free
from tensorguard.stack.services import (
    LOOPBACK,
    EngineChoice,
    PackagedAdapter,
    TlsFiles,
    attestor_spec,
    coprocessor_spec,
    gateway_spec,
    inference_spec,
)
from tensorguard.stack.settings import StackSettings
from tensorguard.store.state import AttestorState

_PORTS = {
    "attestor_port": "the attestor",
    "coprocessor_port": "the coprocessor",
    "inference_port": "the inference service",
    "gateway_admin_port": "the gateway's operators",
    "port": "the OpenAI server",
}
EMBEDDED_PORTS = ("attestor_port", "coprocessor_port")
GATEWAY = ServiceName("gateway")
_ENROLMENT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Trust:
    """What an engine needs to talk to an embedded attestor and coprocessor."""

    attestor: str
    attestor_thumbprint: str
    coprocessor: str
    simulated_root_key: Path
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class Endpoints:
    """host:port of every service."""

    attestor: str
    coprocessor: str
    inference: str
    gateway: str
    gateway_admin: str
    authority: str = ""
    """File with the certificate of the authority that certified the services; empty where they use no TLS."""
    gateway_tls_dir: str = ""

    @property
    def base_url(self) -> str:
        """What OpenAI clients take."""
        return f"http://{self.gateway}/v1"


def choose_ports(settings: StackSettings, names: Sequence[str] = tuple(_PORTS)) -> dict[str, int]:
    """A port for each name: the configured one, which must be free, or a free one where it is 0."""
    chosen: dict[str, int] = {}
    for name in names:
        host = settings.host if name == "port" else LOOPBACK
        port = getattr(settings, name)
        if port:
            if port in chosen.values():
                raise ConfigurationError(f"{name}={port} is the port of another service too")
            option = "--" + name.replace("_", "-")
            require_free(host, port, _PORTS[name], f"{option} or TENSAFE_STACK_{name.upper()}")
        while not port or port in chosen.values():
            port = free_port(host)
        chosen[name] = port
    return chosen


def start_trust(
    launcher: Launcher, settings: StackSettings, adapters: Sequence[PackagedAdapter], ports: dict[str, int]
) -> tuple[Trust, DevelopmentState]:
    """Start a development attestor, then a coprocessor for `adapters`; return when both are healthy."""
    state = initialise_development_state(settings.attestor_state, sorted({a.tenant for a in adapters}))
    tls = _tls_files(settings, state) if settings.tls else None
    attestor = attestor_spec(settings, ports["attestor_port"], state, tls)
    launcher.start(attestor)
    coprocessor = coprocessor_spec(settings, ports["coprocessor_port"], state, attestor.address, adapters, tls)
    launcher.start(coprocessor)
    trust = Trust(attestor.address, state.attestor_thumbprint, coprocessor.address, state.simulated_root_key, tls)
    return trust, state


def start_stack(
    launcher: Launcher,
    settings: StackSettings,
    adapters: Sequence[PackagedAdapter],
    engine: EngineChoice,
    api_key: str | None = None,
) -> Endpoints:
    """Start all four services and return when every one is healthy.

    `api_key` is a plain key that clients must then send, and nobody can go round the gateway; without one,
    only a loopback address can be served.
    """
    if not adapters:
        raise ConfigurationError("the stack needs at least one adapter")
    ports = choose_ports(settings)
    keys_file = secret_file = None
    if api_key is not None:
        keys_file = _keys_file(settings, adapters[0].tenant, api_key)
        secret_file = _secret_file(settings)
    trust, state = start_trust(launcher, settings, adapters, ports)
    inference = inference_spec(
        settings,
        ports["inference_port"],
        state,
        trust.attestor,
        trust.coprocessor,
        adapters,
        engine,
        secret_file,
        trust.tls,
    )
    admin_port = ports["gateway_admin_port"]
    gateway = gateway_spec(
        settings, ports["port"], admin_port, inference.address, keys_file, secret_file, trust.attestor, trust.tls
    )
    launcher.start(inference, gateway)
    return Endpoints(
        trust.attestor,
        trust.coprocessor,
        inference.address,
        gateway.address,
        f"{LOOPBACK}:{admin_port}",
        "" if trust.tls is None else str(trust.tls.authority),
        "" if trust.tls is None else str(trust.tls.gateway_dir),
    )


def _tls_files(settings: StackSettings, state: DevelopmentState) -> TlsFiles:
    """What an operator would do with `tensafe attestor authority` and `tensafe attestor enrol`."""
    folder = settings.state_dir.resolve()
    files = TlsFiles(folder / "authority.pem", folder / "enrolment-secret", folder / "gateway-tls")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.enrolment_secret.unlink(missing_ok=True)
    with AttestorState.open(state.state_dir) as opened:
        files.authority.write_bytes(opened.authorities.pem)
        write_secret_file(files.enrolment_secret, opened.enrol(GATEWAY, _ENROLMENT_SECONDS).encode())
    return files


def _keys_file(settings: StackSettings, tenant: str, api_key: str) -> Path:
    """Write the gateway's key file. The key goes through standard input: arguments can be seen by others."""
    path = settings.state_dir / "gateway-keys.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "services.gateway.keys", "import", "--plain-key"]
    done = subprocess.run(
        [*command, "--file", str(path), "--tenant", tenant],
        input=api_key + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigurationError(done.stderr.strip().removeprefix("error: ") or "the API key was refused")
    return path


def _secret_file(settings: StackSettings) -> Path:
    """A fresh secret that the gateway and the inference service share."""
    path = settings.state_dir / "internal-secret"
    path.unlink(missing_ok=True)
    write_secret_file(path, secrets.token_hex(32).encode())
    return path
