"""Revoked adapters and hosts are gone within seconds, by the attestor's word alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorguard.errors import NotFoundError, RevokedError, TenSafeError
from tensorguard.store.revocations import RevocationKind, Subject, revoke
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import ADAPTER, TENANT, World, running_world
from tests.support.raw_host import RawHost

SECONDS = 5.0


def revoke_now(world: World, subject: Subject) -> None:
    """As `tensafe revoke` does it: in a process of its own, on the attestor's database."""
    with (
        AttestorState.open(world.state.state_dir) as state,
        state.audit.recording("revoke", {"kind": subject.kind.value}) as connection,
    ):
        revoke(connection, subject, "", int(time.time()))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "not enforced in time"
        time.sleep(0.05)


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
        revoke_now(world, Subject(RevocationKind.VERSION, TENANT, ADAPTER, 2))
        revoke_now(world, subject)
        wait_for(lambda: not store.all())
        wait_for(lambda: raised(lambda: store.get(ADAPTER)) is RevokedError)


def test_the_sessions_of_a_revoked_host_end_and_others_stay(tmp_path: Path) -> None:
    with running_world(tmp_path) as world, RawHost(world).opened() as revoked, RawHost(world).opened() as other:
        revoked.evaluate(3)
        revoke_now(world, Subject(RevocationKind.WORKLOAD, value=revoked.workload.identity.public.thumbprint))
        wait_for(lambda: len(world.coprocessor.servicer._registry) == 1)
        other.evaluate(3)


def test_a_revoked_coprocessor_serves_nothing(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        keeper = world.coprocessor.keepers[0]
        assert keeper._adapter is not None
        thumbprint = keeper._adapter.workload.identity.public.thumbprint
        revoke_now(world, Subject(RevocationKind.WORKLOAD, value=thumbprint))
        wait_for(lambda: not world.coprocessor.servicer._store.all())


def raised(call: Callable[[], object]) -> type[TenSafeError] | None:
    try:
        call()
    except (RevokedError, NotFoundError) as error:
        return type(error)
    return None
