"""Revoked adapters and hosts are gone within seconds, by the attestor's word alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tensorguard.errors import NotFoundError, RevokedError, TenSafeError
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.coprocessor import ADAPTER, TENANT, running_world
from tests.support.raw_host import RawHost
from tests.support.revocations import revoke_now, wait_for


@pytest.mark.parametrize(
    "subject",
    [
        Subject(RevocationKind.PACKAGE, TENANT, ADAPTER),
        Subject(RevocationKind.VERSION, TENANT, ADAPTER, 1),
    ],
)
def test_a_revoked_adapter_is_dropped(tmp_path: Path, subject: Subject) -> None:
    with running_world(tmp_path) as world, RawHost(world).opened() as host:
        host.evaluate(3)
        store = world.coprocessor.servicer._store
        revoke_now(world.state.state_dir, Subject(RevocationKind.VERSION, TENANT, ADAPTER, 2))
        revoke_now(world.state.state_dir, subject)
        wait_for(lambda: not store.all())
        wait_for(lambda: raised(lambda: store.get(ADAPTER)) is RevokedError)


def test_the_sessions_of_a_revoked_host_end_and_others_stay(tmp_path: Path) -> None:
    with running_world(tmp_path) as world, RawHost(world).opened() as revoked, RawHost(world).opened() as other:
        revoked.evaluate(3)
        revoke_now(
            world.state.state_dir, Subject(RevocationKind.WORKLOAD, value=revoked.workload.identity.public.thumbprint)
        )
        wait_for(lambda: len(world.coprocessor.servicer._registry) == 1)
        other.evaluate(3)


def test_a_revoked_coprocessor_serves_nothing(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        keeper = world.coprocessor.keepers[0]
        assert keeper._adapter is not None
        thumbprint = keeper._adapter.workload.identity.public.thumbprint
        revoke_now(world.state.state_dir, Subject(RevocationKind.WORKLOAD, value=thumbprint))
        wait_for(lambda: not world.coprocessor.servicer._store.all())


def test_a_revoked_package_does_not_keep_new_hosts_from_the_others(tmp_path: Path) -> None:
    """The coprocessor's own token is not one for its first package."""
    with running_world(tmp_path) as world:
        revoke_now(world.state.state_dir, Subject(RevocationKind.PACKAGE, TENANT, ADAPTER))
        wait_for(lambda: not world.coprocessor.servicer._store.all())
        world.coprocessor.servicer._workload._expires_at = 0  # it needs a new token
        with RawHost(world) as host:
            host.begin()
            host.complete()
            with pytest.raises(RevokedError):
                host.attach()


def raised(call: Callable[[], object]) -> type[TenSafeError] | None:
    try:
        call()
    except (RevokedError, NotFoundError) as error:
        return type(error)
    return None
