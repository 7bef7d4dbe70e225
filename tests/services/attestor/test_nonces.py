from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from services.attestor.nonces import NonceStore
from tensorguard.errors import NonceError, UnavailableError

from .conftest import Clock


def test_once(clock: Clock) -> None:
    store = NonceStore(clock=clock)
    nonce = store.create()
    assert len(nonce.value) == 32
    store.consume(nonce.value)
    with pytest.raises(NonceError):
        store.consume(nonce.value)


def test_expiry_spends_it_too(clock: Clock) -> None:
    store = NonceStore(life_seconds=60, clock=clock)
    nonce = store.create()
    clock.now += 60
    with pytest.raises(NonceError, match="expired"):
        store.consume(nonce.value)
    clock.now -= 30
    with pytest.raises(NonceError, match="unknown"):
        store.consume(nonce.value)


def test_bounded_and_recovers(clock: Clock) -> None:
    store = NonceStore(capacity=10, life_seconds=60, clock=clock)
    for _ in range(10):
        store.create()
    with pytest.raises(UnavailableError):
        store.create()
    clock.now += 61
    store.create()


def test_one_winner_of_a_race(clock: Clock) -> None:
    store = NonceStore(clock=clock)
    value = store.create().value

    def take(_: int) -> bool:
        try:
            store.consume(value)
        except NonceError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(64))) == 1
