"""A whole small world in one process: attestor, sealed adapter, coprocessor. All real but the hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.attestor.server import build_attestor
from services.attestor.settings import AttestorSettings
from services.he_lora.server import Coprocessor, build_coprocessor
from services.he_lora.settings import HeLoraSettings
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.tls import CertifiedKey
from tensorguard.evidence.workload import Workload
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.support.adapters import adapter_config, adapter_tensors, write_adapter, write_base_model

TENANT = "tenant"
ADAPTER = "tiny"


@dataclass(slots=True)
class World:
    """Addresses, keys and files of a running world."""

    folder: Path
    state: DevelopmentState
    attestor: str
    settings: HeLoraSettings
    coprocessor: Coprocessor
    publisher: SigningKeys
    package: VerifiedManifest
    tensors: dict[str, npt.NDArray[np.float32]]
    authority: Path | None = None
    """Certificate of the attestor's authority, where everything uses TLS."""

    @property
    def endpoint(self) -> str:
        return self.coprocessor.server.address

    def client(self) -> AttestorClient:
        tls = None if self.authority is None else CertifiedKey.read(self.authority)
        return AttestorClient(self.attestor, thumbprint=self.state.attestor_thumbprint, tls=tls)

    def workload(self, role: Role = Role.INFERENCE, package_id: str = "") -> Workload:
        platform = SimulatedPlatform(self.state.simulated_root_key)
        return Workload(
            self.client(),
            WorkloadIdentity.generate(),
            platform,
            role=role,
            tenant=TENANT,
            package_id=package_id,
        )

    def delta(self, layer: int, projection: str, x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The plaintext LoRA delta [T, d_out] in float64."""
        parent = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        prefix = f"base_model.model.model.layers.{layer}.{parent}.{projection}.lora_"
        a = self.tensors[prefix + "A.weight"].astype(np.float64)
        b = self.tensors[prefix + "B.weight"].astype(np.float64)
        return 2.0 * (x.astype(np.float64) @ a.T @ b.T)  # alpha / r = 2


class RestartableAttestor:
    """An attestor that can be away for a while, and comes back at the same address."""

    def __init__(self, state: DevelopmentState, *, tls: bool = False) -> None:
        self._state = state
        self._tls = tls
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        self._attestor = build_attestor(
            AttestorSettings(
                state_dir=self._state.state_dir,
                policy_file=self._state.policy_file,
                listen=self.address,
                simulated_root_public_key=self._state.simulated_root_public_key,
                mutual_listen="127.0.0.1:0" if self._tls else None,
                _cli_parse_args=[],
            )
        )
        self._attestor.server.start()
        self.address = self._attestor.server.address

    def stop(self) -> None:
        self._attestor.server.stop(0)
        self._attestor.close()


@contextmanager
def running_attestor(state: DevelopmentState, *, tls: bool = False) -> Iterator[str]:
    attestor = RestartableAttestor(state, tls=tls)
    try:
        yield attestor.address
    finally:
        attestor.stop()


@contextmanager
def running_world(
    folder: Path,
    *,
    lease_seconds: int = 300,
    tokens_per_grant: int = 65_536,
    tokens_per_release: int = 100_000_000,
    mode: Literal["factored", "full"] = "factored",
    parameter_set: str | None = None,
    tls: bool = False,
    attestor_of: Callable[..., AbstractContextManager[str]] = running_attestor,
    **settings: Any,
) -> Iterator[World]:
    """The adapter is packed in `mode` for `parameter_set`; with `tls` everything uses it; `attestor_of` runs the
    attestor; `settings` go to the coprocessor."""
    state = initialise_development_state(
        folder / "state",
        TENANT,
        lease_seconds=lease_seconds,
        tokens_per_grant=tokens_per_grant,
        tokens_per_release=tokens_per_release,
    )
    publisher = SigningKeys.generate()
    public = folder / "publisher.pem"
    public.write_bytes(publisher.public.to_pem())
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    tensors = adapter_tensors(projections)
    package = pack_adapter(
        write_adapter(folder / "adapter", tensors, adapter_config(projections)),
        folder / "adapter.tssp",
        base_model_dir=write_base_model(folder / "model"),
        tenant=TENANT,
        package_id=ADAPTER,
        sequence=1,
        signing_keys=publisher,
        key_registrar=AttestorState.open(state.state_dir).packages.register,
        mode=mode,
        parameter_set=parameter_set,
    )
    authority = None
    if tls:
        authority = settings["attestor_authority"] = folder / "authority.pem"
        with AttestorState.open(state.state_dir) as opened:
            authority.write_bytes(opened.authority.pem)
    with attestor_of(state, tls=True) if tls else attestor_of(state) as attestor:
        configured, coprocessor = start_coprocessor(state, attestor, [folder / "adapter.tssp"], [public], **settings)
        world = World(folder, state, attestor, configured, coprocessor, publisher, package, tensors, authority)
        try:
            yield world
        finally:  # a test may have put another one in its place
            world.coprocessor.server.stop(0)
            world.coprocessor.close()


def start_coprocessor(
    state: DevelopmentState, attestor: str, packages: list[Path], publisher_keys: list[Path], **settings: Any
) -> tuple[HeLoraSettings, Coprocessor]:
    """Serve packages of `TENANT`. The caller stops and closes it."""
    given: dict[str, Any] = {
        "packages": packages,
        "publisher_keys": publisher_keys,
        "tenant": TENANT,
        "attestor": attestor,
        "attestor_thumbprint": state.attestor_thumbprint,
        "simulated_root_key": state.simulated_root_key,
        "listen": "127.0.0.1:0",
        **settings,
    }
    configured = HeLoraSettings(_cli_parse_args=[], **given)
    coprocessor = build_coprocessor(configured)
    coprocessor.start()
    return configured, coprocessor
