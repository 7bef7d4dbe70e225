from __future__ import annotations

from typing import Any

import pytest

from services.he_lora.adapters import AdapterStore, ServedAdapter
from services.he_lora.leases import LeaseKeeper
from services.he_lora.metering import TokenMeter
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.errors import (
    BudgetExhaustedError,
    LeaseExpiredError,
    NotFoundError,
    RevokedError,
    TenSafeError,
    UnavailableError,
)
from tensorguard.evidence.release import LeaseTerms

TOKENS = 100


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeWorkload:
    """Grants what is asked, or fails as told."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.error: TenSafeError | None = None
        self.granted = TOKENS
        self.calls: list[tuple[int, int]] = []

    def renew(self, lease_id: str, *, tokens_used: int, tokens_wanted: int) -> LeaseTerms:
        self.calls.append((tokens_used, tokens_wanted))
        if self.error is not None:
            raise self.error
        self.granted += tokens_wanted
        return LeaseTerms(lease_id, int(self.clock.now) + 100, self.granted)


class Parts:
    def __init__(self) -> None:
        self.clock = Clock()
        self.workload = FakeWorkload(self.clock)
        self.store = AdapterStore()
        self.adapter = self.make("first")
        self.store.put(self.adapter)
        self.opened: list[ServedAdapter] = []
        self.open_error: TenSafeError | None = None
        self.keeper = LeaseKeeper(self.store, self.adapter, self.reopen, TOKENS, self.clock, retry_seconds=5)

    def make(self, lease: str) -> ServedAdapter:
        workload: Any = self.workload
        return ServedAdapter(
            name="a",
            tenant="t",
            digest="00",
            sequence=1,
            base_model="m",
            parameters=get_parameter_set(DEFAULT_PARAMETER_SET),
            envelope=b"",
            basis=b"",
            groups={},
            meter=TokenMeter(LeaseTerms(lease, int(self.clock.now) + 100, TOKENS), self.clock),
            workload=workload,
        )

    def reopen(self) -> ServedAdapter:
        if self.open_error is not None:
            raise self.open_error
        self.opened.append(self.make("second"))
        return self.opened[-1]


@pytest.fixture
def parts() -> Parts:
    return Parts()


def test_renews_at_half_time_and_reports_what_was_used(parts: Parts) -> None:
    parts.adapter.meter.charge(0, "qkv", 30)
    parts.clock.now = 49
    assert parts.keeper.step() > 0 and parts.workload.calls == []
    parts.clock.now = 50
    parts.keeper.step()
    assert parts.workload.calls == [(30, 30)], "tops up to what it works with"
    assert parts.adapter.meter.terms.expires_at == 150 and parts.adapter.meter.left == 100


def test_renews_early_when_tokens_run_low_but_not_for_ever(parts: Parts) -> None:
    parts.adapter.meter.charge(0, "qkv", 80)
    parts.keeper.step()
    assert parts.workload.calls == [(80, 80)]
    parts.keeper.step()
    assert len(parts.workload.calls) == 1
    # The attestor grants no more: the keeper must not ask in a loop.
    parts.adapter.meter.renewed(LeaseTerms("first", 1000, 100))
    parts.workload.renew = lambda *_, **__: LeaseTerms("first", 1000, 100)  # type: ignore[method-assign]
    pauses = [parts.keeper.step() for _ in range(5)]
    assert pauses[1:] == [1.0] * 4


def test_outage_is_survived_until_the_lease_ends(parts: Parts) -> None:
    parts.workload.error = UnavailableError("attestor gone")
    parts.clock.now = 60
    assert parts.keeper.step() == 5
    assert parts.store.get("a") is parts.adapter
    parts.clock.now = 100
    with pytest.raises(LeaseExpiredError):
        parts.store.get("a")
    parts.keeper.step()
    with pytest.raises(LeaseExpiredError):
        parts.store.get("a")
    assert parts.store.all() == []
    with pytest.raises(NotFoundError):
        parts.store.get("b")


def test_a_renewal_that_fails_is_tried_again_before_a_short_lease_ends(parts: Parts) -> None:
    parts.adapter.meter.renewed(LeaseTerms("first", 8, TOKENS))
    parts.workload.error = UnavailableError("attestor gone")
    parts.clock.now = 4
    pauses = []
    while parts.clock.now < 8:
        pauses.append(parts.keeper.step())
        parts.clock.now += pauses[-1]
    assert pauses[:2] == [2, 1] and min(pauses) == 0.1
    parts.clock.now, parts.workload.error = 6, None
    parts.keeper.step()
    assert parts.adapter.meter.terms.expires_at == 106


def test_dropped_adapter_comes_back_with_a_fresh_lease(parts: Parts) -> None:
    parts.adapter.meter.charge(0, "qkv", 10)
    parts.clock.now = 100
    parts.keeper.step()
    parts.open_error = BudgetExhaustedError("spent")
    pauses = [parts.keeper.step() for _ in range(6)]
    assert pauses == [10, 20, 40, 60, 60, 60]
    with pytest.raises(BudgetExhaustedError, match=r"^spent$"):
        parts.store.get("a")
    parts.open_error = None
    parts.keeper.step()
    assert parts.store.get("a") is parts.opened[0]
    assert parts.store.tokens_charged == 10, "what was charged before stays counted"


def test_attestor_that_ended_the_lease_is_obeyed(parts: Parts) -> None:
    parts.workload.error = LeaseExpiredError("over")
    parts.clock.now = 50
    parts.keeper.step()
    with pytest.raises(LeaseExpiredError):
        parts.adapter.meter.charge(0, "qkv", 1)


def test_stop_reports_the_last_tokens(parts: Parts) -> None:
    parts.keeper.start()
    parts.adapter.meter.charge(0, "qkv", 3)
    parts.keeper.stop()
    assert parts.workload.calls[-1] == (3, 0)


def test_a_revoked_adapter_is_dropped_for_that_reason(parts: Parts) -> None:
    assert parts.keeper.serves("a", 0) and parts.keeper.serves("a", 1)
    assert not parts.keeper.serves("a", 2) and not parts.keeper.serves("b", 0)
    parts.keeper.revoke(RevokedError("revoked"))
    with pytest.raises(RevokedError, match=r"^revoked$"):
        parts.store.get("a")
    parts.open_error = RevokedError("still revoked")
    parts.keeper.step()
    parts.keeper.step()
    with pytest.raises(RevokedError, match=r"^still revoked$"):
        parts.store.get("a")
    assert parts.opened == []


def test_a_renewal_that_is_refused_as_revoked_drops_at_once(parts: Parts) -> None:
    parts.workload.error = RevokedError("revoked")
    parts.clock.now = 50
    parts.keeper.step()
    with pytest.raises(RevokedError):
        parts.store.get("a")


def test_a_revocation_while_the_adapter_is_opened_again_is_not_lost(parts: Parts) -> None:
    parts.clock.now = 100
    parts.keeper.step()
    reopen = parts.reopen

    def revoked_meanwhile() -> ServedAdapter:
        parts.keeper.revoke(RevokedError("revoked"))
        return reopen()

    parts.keeper._open_again = revoked_meanwhile
    parts.keeper.step()
    with pytest.raises(RevokedError):
        parts.store.get("a")
