"""An inference host reaches services on other machines with TLS, or where plaintext is permitted by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.connect import Connector
from tensorguard.errors import ConfigurationError, UnavailableError
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world

ELSEWHERE = "service.invalid:7400"


def connect(world: World, *, plaintext_network: bool = False, **endpoints: str) -> None:
    values = {"coprocessor_endpoint": world.endpoint, "attestor_endpoint": world.attestor} | endpoints
    connection = AdapterConnection(
        name=ADAPTER, tenant=TENANT, publisher_keys=tuple(world.settings.publisher_keys), **values
    )
    settings = WorkerSettings(
        model_path=world.folder / "model",
        require_attestation=False,
        simulated_root_key=world.state.simulated_root_key,
        plaintext_network=plaintext_network,
        pool_bytes=0,
        shared_memory_bytes=0,
    )
    Connector(settings).connect(connection).close()


def test_plaintext_to_another_machine_has_to_be_permitted(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        connect(world)
        for service in ("coprocessor_endpoint", "attestor_endpoint"):
            with pytest.raises(ConfigurationError, match=rf"{ELSEWHERE} is not a loopback.*plaintext_network"):
                connect(world, **{service: ELSEWHERE})
        with pytest.raises(UnavailableError):
            connect(world, plaintext_network=True, attestor_endpoint=ELSEWHERE)
