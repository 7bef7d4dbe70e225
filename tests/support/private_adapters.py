"""Real attestor and coprocessor for any number of PEFT folders, and connections to them for an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.he_lora.server import Coprocessor, build_coprocessor
from services.he_lora.settings import HeLoraSettings
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.evidence.development import initialise_development_state
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import TENANT, running_attestor, start_coprocessor


@dataclass(slots=True)
class PrivateAdapters:
    """What `EngineCore.start` needs to know of running services."""

    connections: tuple[AdapterConnection, ...]
    simulated_root_key: Path
    settings: HeLoraSettings
    coprocessor: Coprocessor

    def stop(self) -> None:
        """End the coprocessor, with its streams and sessions."""
        self.coprocessor.server.stop(0)
        self.coprocessor.close()

    def start_again(self) -> None:
        """Start a coprocessor at the address of the one that was stopped."""
        self.coprocessor = build_coprocessor(self.settings)
        self.coprocessor.start()


@contextmanager
def private_adapters(folder: Path, model: Path, adapters: Mapping[str, Path]) -> Iterator[PrivateAdapters]:
    """Seal PEFT folders (by name) for `model` and serve all of them from one coprocessor, in this process."""
    state = initialise_development_state(folder / "state", TENANT)
    publisher, registry = SigningKeys.generate(), AttestorState.open(state.state_dir).packages
    public = folder / "publisher.pem"
    public.write_bytes(publisher.public.to_pem())
    for name, source in adapters.items():
        pack_adapter(
            source,
            folder / f"{name}.tssp",
            base_model_dir=model,
            tenant=TENANT,
            package_id=name,
            sequence=1,
            signing_keys=publisher,
            key_registrar=registry.register,
        )
    with running_attestor(state) as attestor:
        packages = [folder / f"{name}.tssp" for name in adapters]
        settings, coprocessor = start_coprocessor(state, attestor, packages, [public])
        address = coprocessor.server.address
        connections = tuple(
            AdapterConnection(
                name=name,
                coprocessor_endpoint=address,
                attestor_endpoint=attestor,
                attestor_thumbprint=state.attestor_thumbprint,
                tenant=TENANT,
                publisher_keys=(public,),
            )
            for name in adapters
        )
        private = PrivateAdapters(
            connections, state.simulated_root_key, settings.model_copy(update={"listen": address}), coprocessor
        )
        try:
            yield private
        finally:
            private.stop()
