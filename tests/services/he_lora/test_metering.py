from __future__ import annotations

import threading

import pytest

from services.he_lora.metering import TokenMeter
from tensorguard.errors import BudgetExhaustedError, LeaseExpiredError
from tensorguard.evidence.release import LeaseTerms


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter(granted: int = 100, clock: Clock | None = None) -> TokenMeter:
    return TokenMeter(LeaseTerms("lease", 2000, granted), clock or Clock())


def test_a_token_through_all_layers_is_charged_once() -> None:
    m = meter()
    for layer in range(30):
        for group in ("qkv", "o"):
            m.charge(layer, group, 5)
    assert (m.used, m.left) == (5, 95)


def test_the_busiest_group_pays() -> None:
    m = meter()
    m.charge(0, "qkv", 10)
    m.charge(0, "qkv", 10)
    m.charge(1, "qkv", 15)
    assert m.used == 20
    m.charge(1, "qkv", 15)
    assert m.used == 30


def test_budget_is_a_hard_limit_and_refusals_cost_nothing() -> None:
    m = meter(10)
    m.charge(0, "qkv", 9)
    with pytest.raises(BudgetExhaustedError):
        m.charge(0, "qkv", 2)
    m.charge(0, "o", 9)  # does not raise the maximum
    m.charge(0, "qkv", 1)
    assert (m.used, m.left) == (10, 0)
    with pytest.raises(BudgetExhaustedError):
        m.charge(0, "qkv", 1)


def test_lease_end() -> None:
    clock = Clock()
    m = meter(100, clock)
    m.charge(0, "qkv", 1)
    clock.now = 2000.0
    assert m.expired
    with pytest.raises(LeaseExpiredError):
        m.charge(0, "qkv", 1)
    m.renewed(LeaseTerms("lease", 3000, 100))
    m.charge(0, "qkv", 1)
    m.end()
    with pytest.raises(LeaseExpiredError):
        m.charge(0, "qkv", 1)


def test_renewal_extends_and_another_lease_counts_anew() -> None:
    m = meter(10)
    m.charge(0, "qkv", 10)
    m.renewed(LeaseTerms("lease", 2000, 15))
    assert (m.used, m.left) == (10, 5)
    m.renewed(LeaseTerms("next", 2000, 7))
    assert (m.used, m.left, m.total) == (0, 7, 10)
    m.charge(0, "qkv", 7)
    assert (m.used, m.left, m.total) == (7, 0, 17)


def test_threads_cannot_overdraw() -> None:
    m = meter(1000)
    refused: list[int] = []

    def spend() -> None:
        for _ in range(400):
            try:
                m.charge(0, "qkv", 1)
            except BudgetExhaustedError:
                refused.append(1)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert m.used == 1000 and len(refused) == 600
