"""An inference host follows the attestor: what is revoked there ends its sessions within seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.connect import ConnectedAdapter, Connector
from tensorguard.errors import RevokedError
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world
from tests.support.revocations import revoke_now, wait_for


def connector_of(world: World) -> Connector:
    return Connector(
        WorkerSettings(
            model_path=world.folder / "model",
            require_attestation=False,
            simulated_root_key=world.state.simulated_root_key,
            pool_bytes=0,
            shared_memory_bytes=0,
        )
    )


def connection_of(world: World) -> AdapterConnection:
    return AdapterConnection(
        name=ADAPTER,
        coprocessor_endpoint=world.endpoint,
        attestor_endpoint=world.attestor,
        attestor_thumbprint=world.state.attestor_thumbprint,
        publisher_keys=tuple(world.settings.publisher_keys),
        tenant=TENANT,
        require_attestation=False,
    )


def own(connected: ConnectedAdapter) -> Subject:
    return Subject(RevocationKind.WORKLOAD, value=connected.session._workload.identity.public.thumbprint)


def coprocessors(connected: ConnectedAdapter) -> Subject:
    assert connected.session._link is not None
    return Subject(RevocationKind.WORKLOAD, value=connected.session._link.handshake.peer.identity.thumbprint)


def adapters(_: ConnectedAdapter) -> Subject:
    return Subject(RevocationKind.VERSION, TENANT, ADAPTER, 1)


@pytest.mark.parametrize("subject_of", [own, coprocessors, adapters])
def test_what_is_revoked_ends_the_session(tmp_path: Path, subject_of: Callable[[ConnectedAdapter], Subject]) -> None:
    """By the host's own doing: this coprocessor does not listen to revocations."""
    with running_world(tmp_path) as world:
        world.coprocessor.follower._apply = lambda _: None
        connected = connector_of(world).connect(connection_of(world))
        try:
            assert connected.session.healthy
            revoke_now(world.state.state_dir, subject_of(connected))
            wait_for(lambda: not connected.session.healthy)
        finally:
            connected.close()


def test_a_revoked_host_is_not_attested_again(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        connector = connector_of(world)
        connected = connector.connect(connection_of(world))
        revoke_now(world.state.state_dir, own(connected))
        connected.close()
        with pytest.raises(RevokedError):
            connector.connect(connection_of(world))
