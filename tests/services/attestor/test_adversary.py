"""Attacks on a running attestor over its whole protocol: each is refused for its own reason, and leaves nothing behind.

What concerns one step alone is beside that step: nonces and evidence in test_attest.py, stolen tokens, changed requests
and old sequences in test_release.py, single revocations in test_revocation.py, tokens in test_forged_tokens.py.
"""

from __future__ import annotations

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from services.attestor.server import build_attestor
from tensorguard.errors import (
    EvidenceRefusedError,
    InternalError,
    InvalidInputError,
    NonceError,
    RevokedError,
    TokenError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.audit_head import HeadKeeper, RollbackError
from tensorguard.store.backup import back_up, restore
from tensorguard.store.database import FILE_NAME
from tensorguard.store.revocations import RevocationKind, Subject, revoke
from tensorguard.store.state import AttestorState, StateLocation

from .conftest import CODE, GRANT, LEASE_SECONDS, Bench
from .test_attest import attest, nonce_of, request
from .test_forged_tokens import METHODS, ask, decisions, granted

# Sizes


@pytest.mark.parametrize("method", [*METHODS, "Attest"])
def test_more_than_a_message_may_have_is_not_read(bench: Bench, method: str) -> None:
    records = bench.attestor.state.audit.head.records
    message = getattr(pb, f"{method}Request")()
    setattr(message, "evidence" if method == "Attest" else "signature", bytes(300 * 1024))
    with pytest.raises(grpc.RpcError) as refused:
        answer = getattr(bench.client()._stub, method)(message, timeout=5)
        next(answer)
    error = from_rpc_error(refused.value)
    assert (type(error), error.reason) == (InvalidInputError, "invalid_input")
    assert bench.attestor.state.audit.head.records == records


def test_deeply_nested_evidence(bench: Bench) -> None:
    """Its signature is asked first; then nothing that deep is well-formed."""
    identity = WorkloadIdentity.generate()
    for evidence in (b"[" * 60_000, b'{"a":' * 12_000, b"\x9f" * 60_000):
        with pytest.raises(EvidenceRefusedError):
            attest(bench, request(bench, identity, nonce_of(bench), evidence=evidence))
        assert decisions(bench)[-1]["detail"] in ("signature", "malformed")


# Clocks


def at_skew(bench: Bench, seconds: float) -> Workload:
    """A workload whose clock differs from the attestor's."""
    workload = bench.workload()
    workload.client._clock = lambda: bench.clock() + seconds
    workload._platform._clock = workload.client._clock  # type: ignore[attr-defined]
    return workload


@pytest.mark.parametrize("seconds", [-4, 4])
def test_clocks_may_differ_by_seconds(bench: Bench, seconds: float) -> None:
    assert at_skew(bench, seconds).release_key(bench.release, tokens_wanted=1).terms.tokens_granted == 1


@pytest.mark.parametrize("seconds", [-400, 400])
def test_a_platform_whose_clock_is_wrong_is_told_so(bench: Bench, seconds: float) -> None:
    with pytest.raises(EvidenceRefusedError, match="check both machines' clocks"):
        at_skew(bench, seconds).token()
    assert decisions(bench)[-1]["detail"] == "evidence_time"


def test_a_workload_does_not_use_a_token_from_its_future(bench: Bench) -> None:
    with pytest.raises(TokenError, match="from the future; check both machines' clocks"):
        at_skew(bench, -30).token()


def test_a_clock_that_is_set_back_extends_nothing(bench: Bench) -> None:
    """A token is from the future then, and a renewed lease ends earlier than before."""
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=10).terms
    token, ended = workload.token(), lease.expires_at
    bench.clock.now -= 100
    for method in METHODS:
        with pytest.raises(TokenError, match="from the future"):
            ask(bench, method, token, workload.identity, lease.lease_id)
    again = bench.client().attest(
        workload.identity, bench.platform(), role=Role.COPROCESSOR, tenant="tenant", package_id="package"
    )
    renewed = ask(bench, "RenewLease", again, workload.identity, lease.lease_id)
    assert renewed.lease_expires_at == bench.clock() + LEASE_SECONDS < ended


# Races


def test_one_challenge_is_answered_once_however_many_try(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    message = request(bench, identity, nonce_of(bench))

    def outcome(_: int) -> str:
        try:
            return "token" if attest(bench, message) else ""
        except NonceError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(outcome, range(8))) == ["nonce"] * 7 + ["token"]


def test_a_double_release_through_two_attestors_is_one_lease(bench: Bench) -> None:
    workload = bench.workload()
    token = workload.token()
    second = build_attestor(bench.settings(), clock=bench.clock)
    second.server.start()
    clients = [
        AttestorClient(address, thumbprint=bench.state.attestor_thumbprint, clock=bench.clock)
        for address in (bench.attestor.server.address, second.server.address)
    ]

    def release(number: int) -> str:
        client = clients[number % 2]
        return client.release_key(workload.identity, token, bench.release, tokens_wanted=GRANT).terms.lease_id

    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(release, range(16)))) == 1
        assert granted(bench) == GRANT
    finally:
        for client in clients:
            client.close()
        second.server.stop(0)
        second.close()


# Restarts


def test_a_restart_between_any_two_steps_is_not_noticed(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    message = request(bench, identity, nonce_of(bench))
    bench.restart()
    token = attest(bench, message)
    bench.restart()
    released = bench.client().release_key(identity, token, bench.release, tokens_wanted=10)
    bench.restart()
    again = bench.client().release_key(identity, token, bench.release, tokens_wanted=300)
    assert again.terms == released.terms
    bench.restart()
    renewed = bench.client().renew(identity, token, released.terms.lease_id, tokens_used=10, tokens_wanted=5)
    assert (renewed.tokens_granted, granted(bench)) == (15, 15)


def test_an_attestor_that_dies_before_its_answer_is_asked_again_and_charges_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = bench.workload()
    token = workload.token()

    def dies(self: HeadKeeper, *_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(HeadKeeper, "keep", dies)
    with pytest.raises(InternalError):
        workload.release_key(bench.release, tokens_wanted=100)
    monkeypatch.undo()
    bench.restart()
    released = bench.client().release_key(workload.identity, token, bench.release, tokens_wanted=100)
    assert (released.terms.tokens_granted, granted(bench)) == (100, 100)


# An old database


def test_a_database_from_an_old_backup_is_refused_and_its_lost_tokens_are_worth_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    backup = tmp_path / "backup.sqlite3"
    back_up(bench.attestor.state, backup)
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=GRANT).terms
    token = workload.token()
    bench.stop()
    for path in bench.state.state_dir.glob(f"{FILE_NAME}*"):
        path.unlink()
    restore(backup, bench.state.state_dir)
    with pytest.raises(RollbackError) as refused:
        build_attestor(bench.settings(), clock=bench.clock)
    assert refused.value.reason == "rollback"

    AttestorState(StateLocation(bench.state.state_dir), clock=bench.clock, accept_rollback="the disk was lost").close()
    bench.attestor = bench._start()
    for method in METHODS:
        with pytest.raises(TokenError, match="no record of this token"):
            ask(bench, method, token, workload.identity, lease.lease_id)
    assert [item["reason"] for item in decisions(bench)[-2:]] == ["token", "token"]


def test_a_database_that_is_set_back_under_a_running_attestor_releases_nothing(bench: Bench, tmp_path: Path) -> None:
    """By the database's own tools: else its new records would soon be more than the heads outside have seen."""
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=10).terms
    backup = tmp_path / "backup.sqlite3"
    back_up(bench.attestor.state, backup)
    workload.renew(lease.lease_id, tokens_used=1, tokens_wanted=GRANT)
    kept = (bench.state.state_dir / "audit.head").read_bytes()
    with (
        contextlib.closing(sqlite3.connect(backup)) as source,
        contextlib.closing(sqlite3.connect(bench.state.state_dir / FILE_NAME)) as live,
    ):
        source.backup(live)
    for attempt in (
        lambda: workload.renew(lease.lease_id, tokens_used=1, tokens_wanted=GRANT),
        lambda: workload.release_key(bench.release, tokens_wanted=GRANT),
        lambda: bench.workload().token(),
    ):
        with pytest.raises(InternalError, match="it was set back"):
            attempt()
    assert granted(bench) == 10
    assert (bench.state.state_dir / "audit.head").read_bytes() == kept


# Everything revoked


def test_with_everything_revoked_nothing_is_left_to_ask(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=1).terms
    token = workload.token()
    package = bench.attestor.state.packages.lookup("tenant", "package", 1, bench.release.manifest_digest.hex())
    subjects = [
        Subject(RevocationKind.PACKAGE, "tenant", "package"),
        Subject(RevocationKind.VERSION, "tenant", "package", 1),
        Subject(RevocationKind.KEY, value=package.key_id),
        Subject(RevocationKind.WORKLOAD, value=workload.identity.public.thumbprint),
        Subject(RevocationKind.MEASUREMENT, value=CODE),
        Subject(RevocationKind.CHIP, value="ab" * 64),
    ]
    with bench.attestor.state.audit.recording("revoke", {}) as connection:
        for subject in subjects:
            revoke(connection, subject, "", int(bench.clock()))
    for method in METHODS:
        with pytest.raises(RevokedError):
            ask(bench, method, token, workload.identity, lease.lease_id)
    with pytest.raises(RevokedError):
        bench.workload().token()
    last = decisions(bench)[-3:]
    assert [(item["event"], item["reason"]) for item in last] == [
        ("release", "revoked"),
        ("renew", "revoked"),
        ("attest", "revoked"),
    ]
    assert {item["detail"] for item in last} <= {f"{kind.value}_revoked" for kind in RevocationKind}
