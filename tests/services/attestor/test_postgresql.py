"""Two attestors on one PostgreSQL database are one attestor, in everything a workload can see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import BudgetExhaustedError, NonceError, RevokedError
from tensorguard.evidence.workload import Workload
from tensorguard.store.audit_head import RollbackError
from tensorguard.store.revocations import RevocationKind, Subject, revoke
from tests.support.postgresql import new_database
from tests.support.revocations import SECONDS, first_notice

from .conftest import BUDGET, GRANT, Bench, Clock
from .test_attest import attest, nonce_of, request


class ServerBench(Bench):
    """A bench whose attestors keep their state in one PostgreSQL database."""

    def __init__(self, directory: Path, clock: Clock, url: str) -> None:
        self.url = url
        super().__init__(directory, clock)
        self.state = replace(self.state, attestor_thumbprint=self.attestor.state.key.thumbprint)

    def settings(self) -> AttestorSettings:
        return super().settings().model_copy(update={"database_url": SecretStr(self.url)})

    def through(self, attestor: Attestor, workload: Workload) -> Workload:
        """The same workload, at another attestor."""
        first, self.attestor = self.attestor, attestor
        try:
            return self.workload(identity=workload.identity)
        finally:
            self.attestor = first


@pytest.fixture
def bench(tmp_path: Path, clock: Clock, postgresql: str) -> Iterator[ServerBench]:
    made = ServerBench(tmp_path, clock, new_database(postgresql))
    yield made
    made.stop()


@pytest.fixture
def second(bench: ServerBench) -> Iterator[Attestor]:
    attestor = build_attestor(bench.settings(), clock=bench.clock)
    attestor.server.start()
    yield attestor
    attestor.server.stop(0)
    attestor.close()


def test_everything_is_in_the_database(bench: ServerBench, second: Attestor) -> None:
    """A release here is a lease there; the budget is one; what is revoked here is pushed and refused there."""
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=GRANT).terms
    elsewhere = bench.through(second, workload)
    assert elsewhere.renew(lease.lease_id, tokens_used=GRANT, tokens_wanted=GRANT).tokens_granted == 2 * GRANT
    assert workload.renew(lease.lease_id, tokens_used=2 * GRANT, tokens_wanted=GRANT).tokens_granted == BUDGET
    with pytest.raises(BudgetExhaustedError):
        elsewhere.renew(lease.lease_id, tokens_used=BUDGET, tokens_wanted=1)

    told = first_notice(elsewhere)
    with bench.attestor.state.audit.recording("revoke", {}) as connection:
        revoke(connection, Subject(RevocationKind.PACKAGE, "tenant", "package"), "", int(bench.clock()))
    assert told.get(timeout=SECONDS).package_id == "package"
    with pytest.raises(RevokedError):
        elsewhere.renew(lease.lease_id, tokens_used=BUDGET, tokens_wanted=0)
    assert bench.audit_lines, "one chain, whoever wrote it"


def test_a_challenge_of_one_is_taken_once_by_either(bench: ServerBench, second: Attestor) -> None:
    workload = bench.workload()
    message = request(bench, workload.identity, nonce_of(bench))
    first, bench.attestor = bench.attestor, second
    try:
        assert attest(bench, message)
    finally:
        bench.attestor = first
    with pytest.raises(NonceError):
        attest(bench, message)


def test_a_database_that_is_set_back_is_noticed(bench: ServerBench) -> None:
    """The heads are files; the server's own backup tools do not set them back."""
    workload = bench.workload()
    workload.token()
    with bench.attestor.state.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM audit WHERE record = (SELECT max(record) FROM audit)")
    bench.attestor.server.stop(0)
    bench.attestor.close()
    with pytest.raises(RollbackError) as refused:
        build_attestor(bench.settings(), clock=bench.clock)
    assert refused.value.reason == "rollback"
