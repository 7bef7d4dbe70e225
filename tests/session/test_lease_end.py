"""With the attestor away, an adapter is served until its lease ends, and again once the attestor is back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensorguard.errors import LeaseExpiredError, TenSafeError, UnavailableError
from tensorguard.evidence.development import DevelopmentState
from tensorguard.evidence.release import LeaseTerms
from tensorguard.evidence.workload import Workload
from tensorguard.session.client import CoprocessorSession
from tests.session.test_client import activations, check_delta, session_with
from tests.support.coprocessor import ADAPTER, RestartableAttestor, World, running_world

LEASE_SECONDS = 8
TOLERANCE_SECONDS = 2.0
RETURN_SECONDS = 60.0


def outcome(session: CoprocessorSession) -> str:
    """Reason for which one delta could not be had; empty when it could."""
    try:
        session.begin(ADAPTER, 0, "qkv", activations(1)).wait()
    except TenSafeError as error:
        return error.reason
    return ""


def until_it_changes(session: CoprocessorSession, usual: str, seconds: float) -> tuple[str, float]:
    """The first outcome that is another than the usual one, and when it was, Unix seconds."""
    ends = time.time() + seconds
    while time.time() < ends:
        if (found := outcome(session)) != usual:
            return found, time.time()
        time.sleep(0.05)
    raise AssertionError(f"nothing but {usual!r} for {seconds} s")


def lease_end(world: World) -> int:
    return world.coprocessor.servicer._store.get(ADAPTER).meter.terms.expires_at


def test_an_attestor_that_only_keeps_silent_does_not_extend_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing drops the adapter while the renewal waits for its answer: the clock alone refuses it."""
    released = threading.Event()

    def waits(self: Workload, *_: object, **__: object) -> LeaseTerms:
        released.wait(4 * LEASE_SECONDS)
        raise UnavailableError("no answer")

    with running_world(tmp_path, lease_seconds=LEASE_SECONDS) as world, session_with(world) as session:
        monkeypatch.setattr(Workload, "renew", waits)
        time.sleep(1.5)  # a renewal that had begun before is over
        expected = lease_end(world)
        try:
            reason, stopped = until_it_changes(session, "", 3 * LEASE_SECONDS)
            assert reason == "lease_expired"
            assert abs(stopped - expected) <= TOLERANCE_SECONDS
            with pytest.raises(LeaseExpiredError, match="lease on this adapter is over"):
                session.attach(ADAPTER)
            assert world.coprocessor.servicer._store.all(), "the keeper still waits, and so did not drop it"
        finally:
            released.set()


def test_serving_stops_at_the_leases_end_and_resumes_by_itself(tmp_path: Path) -> None:
    attestors: list[RestartableAttestor] = []

    @contextmanager
    def restartable(state: DevelopmentState) -> Iterator[str]:
        attestors.append(RestartableAttestor(state))
        try:
            yield attestors[0].address
        finally:
            attestors[0].stop()

    with (
        running_world(tmp_path, lease_seconds=LEASE_SECONDS, attestor_of=restartable) as world,
        session_with(world) as session,
    ):
        first = lease_end(world)
        while lease_end(world) == first:  # served across renewals while the attestor is there
            assert outcome(session) == ""
            time.sleep(0.1)

        attestors[0].stop()
        expected = lease_end(world)
        assert expected - time.time() > TOLERANCE_SECONDS, "the lease was renewed a moment ago"
        reason, stopped = until_it_changes(session, "", 2 * LEASE_SECONDS)
        assert reason == "lease_expired"
        assert abs(stopped - expected) <= TOLERANCE_SECONDS
        with pytest.raises(LeaseExpiredError, match="lease on this adapter is over"):
            session.attach(ADAPTER)

        time.sleep(3.0)
        assert outcome(session) == "lease_expired"
        attestors[0].start()
        reason, _ = until_it_changes(session, "lease_expired", RETURN_SECONDS)
        assert reason == ""
        check_delta(world, session, activations(2), 1, "o")
        assert lease_end(world) > expected
