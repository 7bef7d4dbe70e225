"""Revocation at attest, release and renewal, the watch stream, rate limits and the separation of tenants."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable

import pytest

from services.attestor.callers import Callers, Proof
from services.attestor.decisions import Decisions
from services.attestor.rate_limits import Rate, RateLimiter, peer_host
from tensorguard.errors import (
    AuthenticationError,
    NotFoundError,
    RateLimitedError,
    RevokedError,
    TokenError,
    UnavailableError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.release import Release, RevocationNotice
from tensorguard.evidence.result import AttestationResult
from tensorguard.store.revocations import RevocationKind, Subject, revoke
from tests.support.revocations import SECONDS, first_notice

from .conftest import CODE, Bench


def revoke_now(bench: Bench, kind: RevocationKind, *release: object, value: str = "") -> None:
    subject = Subject(kind, *release, value=value)  # type: ignore[arg-type]
    with bench.attestor.state.audit.recording("revoke", {"kind": kind.value}) as connection:
        revoke(connection, subject, "", int(bench.clock()))


def reasons(bench: Bench) -> list[tuple[str, str, str]]:
    records = [json.loads(line) for line in bench.audit_lines]
    return [(item["event"], item["reason"], item["detail"]) for item in records if item.get("decision") == "refused"]


def test_a_revoked_package_is_refused_everywhere(bench: Bench) -> None:
    workload = bench.workload()
    released = workload.release_key(bench.release, tokens_wanted=10)
    revoke_now(bench, RevocationKind.PACKAGE, "tenant", "package")
    with pytest.raises(RevokedError):
        workload.release_key(bench.release, tokens_wanted=10)
    with pytest.raises(RevokedError):
        workload.renew(released.terms.lease_id, tokens_used=1, tokens_wanted=1)
    with pytest.raises(RevokedError):
        bench.workload().token()
    assert reasons(bench) == [(event, "revoked", "package_revoked") for event in ("release", "renew", "attest")]
    assert bench.workload(tenant="other-tenant").token(), "a package of this name of another tenant is not concerned"


def test_a_revoked_version_leaves_the_next(bench: Bench) -> None:
    revoke_now(bench, RevocationKind.VERSION, "tenant", "package", 1)
    with pytest.raises(RevokedError):
        bench.workload().release_key(bench.release, tokens_wanted=1)
    newer = bench.register("package", 2)
    bench.workload().release_key(newer, tokens_wanted=1)


def test_a_revoked_content_key(bench: Bench) -> None:
    package = bench.attestor.state.packages.lookup("tenant", "package", 1, bench.release.manifest_digest.hex())
    revoke_now(bench, RevocationKind.KEY, value=package.key_id)
    with pytest.raises(RevokedError):
        bench.workload().release_key(bench.release, tokens_wanted=1)
    assert reasons(bench)[-1] == ("release", "revoked", "key_revoked")


@pytest.mark.parametrize("kind", [RevocationKind.WORKLOAD, RevocationKind.MEASUREMENT])
def test_a_revoked_workload_or_measurement(bench: Bench, kind: RevocationKind) -> None:
    """Also with a token from before, for releases and renewals."""
    workload = bench.workload()
    released = workload.release_key(bench.release, tokens_wanted=10)
    value = workload.identity.public.thumbprint if kind is RevocationKind.WORKLOAD else CODE
    revoke_now(bench, kind, value=value)
    for attempt in (
        lambda: workload.release_key(bench.release, tokens_wanted=10),
        lambda: workload.renew(released.terms.lease_id, tokens_used=1, tokens_wanted=1),
        lambda: bench.workload(identity=workload.identity).token(),
    ):
        with pytest.raises(RevokedError):
            attempt()
    assert {detail for _, _, detail in reasons(bench)} == {f"{kind.value}_revoked"}


def test_a_token_that_the_database_forgot_is_refused(bench: Bench) -> None:
    workload = bench.workload()
    workload.token()
    with bench.attestor.state.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM attestations")
    with pytest.raises(TokenError, match="no record of this token"):
        workload.release_key(bench.release, tokens_wanted=1)
    assert reasons(bench) == [("release", "token", "")]
    workload.release_key(bench.release, tokens_wanted=1)  # with a fresh one


def test_a_revocation_between_check_and_decision_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token was good when the request came in; the transaction that decides looks again."""
    workload = bench.workload()
    identify = Callers.identify

    def revoked_afterwards(self: Callers, proof: Proof, role: Role | None = None) -> AttestationResult:
        caller = identify(self, proof, role)
        revoke_now(bench, RevocationKind.WORKLOAD, value=caller.identity.thumbprint)
        return caller

    workload.token()
    monkeypatch.setattr(Callers, "identify", revoked_afterwards)
    with pytest.raises(RevokedError):
        workload.release_key(bench.release, tokens_wanted=1)


# The watch stream


def collect(bench: Bench, **whose: str) -> tuple[list[RevocationNotice], threading.Thread]:
    notices: list[RevocationNotice] = []
    workload = bench.workload(**whose)  # type: ignore[arg-type]
    workload.token()

    def follow() -> None:
        with contextlib.suppress(UnavailableError):  # the attestor stops at the test's end
            for notice in workload.watch_revocations(0):
                notices.append(notice)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    return notices, thread


def wait_for(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 10, "not told in time"
        time.sleep(0.02)
    return time.monotonic() - began


def test_watchers_are_told_within_seconds_and_of_their_tenant_only(bench: Bench) -> None:
    mine, _ = collect(bench)
    others, _ = collect(bench, tenant="other-tenant")
    holder = bench.workload()
    holder.token()
    revoke_now(bench, RevocationKind.VERSION, "tenant", "package", 7)
    revoke_now(bench, RevocationKind.PACKAGE, "other-tenant", "secret")
    revoke_now(bench, RevocationKind.WORKLOAD, value=holder.identity.public.thumbprint)
    assert wait_for(lambda: len(mine) == 2 and len(others) == 1) < 3
    assert mine == [
        RevocationNotice(1, "package", 7),
        RevocationNotice(3, workloads=(holder.identity.public.thumbprint,)),
    ]
    assert others == [RevocationNotice(2, "secret", 0)]


def test_a_revoked_measurement_names_the_workloads_that_run_it(bench: Bench) -> None:
    holder = bench.workload()
    holder.token()
    watcher = bench.workload()
    watcher.token()
    told = first_notice(watcher)
    revoke_now(bench, RevocationKind.MEASUREMENT, value=CODE)
    assert set(told.get(timeout=SECONDS).workloads) == {
        holder.identity.public.thumbprint,
        watcher.identity.public.thumbprint,
    }


def test_a_revocation_from_before_is_told_at_once_and_not_again(bench: Bench) -> None:
    revoke_now(bench, RevocationKind.VERSION, "tenant", "package", 7)
    revoke_now(bench, RevocationKind.VERSION, "tenant", "package", 8)
    assert next(bench.workload().watch_revocations(0)).sequence == 7
    assert next(bench.workload().watch_revocations(1)).sequence == 8


def test_the_stream_ends_with_its_token(bench: Bench) -> None:
    notices, thread = collect(bench)
    time.sleep(0.2)
    bench.clock.now += 301
    thread.join(5)
    assert not thread.is_alive() and notices == []


def test_watching_needs_a_token_and_its_key(bench: Bench) -> None:
    workload = bench.workload()
    thief = WorkloadIdentity.generate()
    with pytest.raises(AuthenticationError):
        next(workload.client.watch_revocations(thief, workload.token(), 0))
    with pytest.raises(TokenError):
        next(workload.client.watch_revocations(workload.identity, "x.y.z", 0))
    revoke_now(bench, RevocationKind.WORKLOAD, value=workload.identity.public.thumbprint)
    with pytest.raises(RevokedError):
        next(workload.watch_revocations(0))


# Tenants


def test_another_tenants_package_looks_like_none(bench: Bench) -> None:
    """Whether it is there, and with which manifest, cannot be told from the answer."""
    workload = bench.workload(tenant="other-tenant")
    messages = set()
    for digest in (bench.release.manifest_digest, bytes(32)):
        with pytest.raises(NotFoundError) as refused:
            workload.release_key(Release("other-tenant", "package", 1, digest), tokens_wanted=1)
        messages.add(refused.value.message)
    assert len(messages) == 1


# Limits


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_hold_for_each_peer_and_for_all() -> None:
    clock = Time()
    limiter = RateLimiter(Rate(1, 3), Rate(2, 5), clock=clock)
    assert [limiter.admit("a") for _ in range(4)] == [True, True, True, False]
    assert [limiter.admit("b") for _ in range(3)] == [True, True, False], "all together"
    clock.now += 1
    assert [limiter.admit("a") for _ in range(2)] == [True, False]
    assert limiter.admit("b")
    clock.now += 100
    assert [limiter.admit("a") for _ in range(4)] == [True, True, True, False], "no more than the burst"


def test_peers_that_are_remembered_are_bounded() -> None:
    limiter = RateLimiter(Rate(1, 3), Rate(1e9, 1e9), clock=Time())
    for number in range(10_000):
        limiter.admit(str(number))
    assert len(limiter._peers) <= 4096


def test_a_new_connection_is_no_new_peer() -> None:
    assert peer_host("ipv4:192.0.2.1:5000") == peer_host("ipv4:192.0.2.1:5001")
    assert peer_host("ipv6:%5B::1%5D:5000") == peer_host("ipv6:%5B::1%5D:1")
    assert peer_host("unix:/x") == "unix:/x"


def test_too_many_requests_are_refused_before_anything_else(bench: Bench) -> None:
    servicer_rate = RateLimiter(Rate(1, 3), Rate(1, 3), clock=Time())
    bench.attestor.servicer._limiter = servicer_rate
    client = bench.client()
    records = bench.attestor.state.audit.head.records
    with pytest.raises(RateLimitedError):
        for _ in range(10):
            client.status()
    assert bench.attestor.state.audit.head.records == records


def test_refusals_of_strangers_grow_the_log_only_so_far(bench: Bench) -> None:
    clock = Time()
    decisions = Decisions(bench.attestor.state.audit, clock=clock)
    before = bench.attestor.state.audit.head.records

    def refuse(peer: str, count: int, *, authenticated: bool = False) -> None:
        for _ in range(count):
            with pytest.raises(TokenError), decisions.deciding("release", peer) as decision:
                decision.authenticated = authenticated
                raise TokenError("no")

    refuse("a", 50)
    assert bench.attestor.state.audit.head.records == before + 20, "the burst of one peer"
    refuse("b", 5, authenticated=True)
    assert bench.attestor.state.audit.head.records == before + 25, "whoever proved a key is always recorded"
    for number in range(60):
        refuse(f"peer-{number}", 5)
    assert bench.attestor.state.audit.head.records == before + 25 + 180, "the burst of all"
    clock.now += 61
    refuse("a", 1)
    decisions.flush()
    counts = [json.loads(line) for line in bench.audit_lines if b'"event":"refusals"' in line]
    assert sum(item["total"] for item in counts) == 30 + 120
    assert counts[0]["counts"] == [{"count": 150, "detail": "", "event": "release", "reason": "token"}]
