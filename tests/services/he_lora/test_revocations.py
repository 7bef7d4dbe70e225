"""Revoked adapters and hosts are gone within seconds, by the attestor's word alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.attestor.watch import LOOK_SECONDS
from tensorguard.errors import NotFoundError, RevokedError, TenSafeError
from tensorguard.evidence.measurement import code_measurement
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world
from tests.support.raw_host import RawHost
from tests.support.revocations import revoke_now, wait_for


def package(_: World) -> Subject:
    return Subject(RevocationKind.PACKAGE, TENANT, ADAPTER)


def version(_: World) -> Subject:
    return Subject(RevocationKind.VERSION, TENANT, ADAPTER, 1)


def content_key(world: World) -> Subject:
    return Subject(RevocationKind.KEY, value=world.package.manifest.key_id)


def coprocessor(world: World) -> Subject:
    adapter = world.coprocessor.keepers[0]._adapter
    assert adapter is not None
    return Subject(RevocationKind.WORKLOAD, value=adapter.workload.identity.public.thumbprint)


def code(_: World) -> Subject:
    return Subject(RevocationKind.MEASUREMENT, value=code_measurement())


@pytest.mark.parametrize("revoked", [package, version, content_key, coprocessor, code])
def test_whatever_of_an_adapter_is_revoked_it_is_dropped(tmp_path: Path, revoked: Callable[[World], Subject]) -> None:
    with running_world(tmp_path) as world, RawHost(world).opened() as host:
        host.evaluate(3)
        store = world.coprocessor.servicer._store
        for other in (
            Subject(RevocationKind.VERSION, TENANT, ADAPTER, 2),
            Subject(RevocationKind.KEY, value="ab" * 16),
            Subject(RevocationKind.MEASUREMENT, value="ab" * 48),
            Subject(RevocationKind.CHIP, value="ab" * 64),
        ):
            revoke_now(world.state.state_dir, other)
        time.sleep(2 * LOOK_SECONDS)
        host.evaluate(3)
        revoke_now(world.state.state_dir, revoked(world))
        wait_for(lambda: not store.all())
        wait_for(lambda: raised(lambda: store.get(ADAPTER)) is RevokedError)
        sessions = world.coprocessor.servicer._registry
        wait_for(lambda: len(sessions) == (0 if revoked is code else 1))  # the host runs the same code


def test_the_sessions_of_a_revoked_host_end_and_others_stay(tmp_path: Path) -> None:
    with running_world(tmp_path) as world, RawHost(world).opened() as revoked, RawHost(world).opened() as other:
        revoked.evaluate(3)
        revoke_now(
            world.state.state_dir, Subject(RevocationKind.WORKLOAD, value=revoked.workload.identity.public.thumbprint)
        )
        wait_for(lambda: len(world.coprocessor.servicer._registry) == 1)
        other.evaluate(3)


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
