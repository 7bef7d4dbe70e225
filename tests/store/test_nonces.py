from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from sqlalchemy import select

from tensorguard.errors import NonceError, UnavailableError
from tensorguard.store.database import Database
from tensorguard.store.nonces import NonceStore
from tensorguard.store.schema import NONCES


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_once(database: Database, clock: Clock) -> None:
    store = NonceStore(database, clock=clock)
    nonce = store.create()
    assert len(nonce.value) == 32
    store.consume(nonce.value)
    with pytest.raises(NonceError, match="unknown"):
        store.consume(nonce.value)


def test_another_attestor_on_the_database_takes_it_once(database: Database, clock: Clock) -> None:
    nonce = NonceStore(database, clock=clock).create()
    other = NonceStore(Database(database.url), clock=clock)
    other.consume(nonce.value)
    with pytest.raises(NonceError):
        NonceStore(database, clock=clock).consume(nonce.value)


def test_the_database_does_not_tell_it(database: Database, clock: Clock) -> None:
    nonce = NonceStore(database, clock=clock).create()
    with database.reading() as connection:
        assert nonce.value.hex() not in str(connection.execute(select(NONCES)).all())


def test_expiry_spends_it_too(database: Database, clock: Clock) -> None:
    store = NonceStore(database, life_seconds=60, clock=clock)
    nonce = store.create()
    clock.now += 60
    with pytest.raises(NonceError, match="expired"):
        store.consume(nonce.value)
    clock.now -= 30
    with pytest.raises(NonceError, match="unknown"):
        store.consume(nonce.value)


def test_bounded_and_recovers(database: Database, clock: Clock) -> None:
    store = NonceStore(database, capacity=10, life_seconds=60, clock=clock)
    for _ in range(10):
        store.create()
    with pytest.raises(UnavailableError):
        store.create()
    clock.now += 61
    store.create()


def test_one_winner_of_a_race(database: Database, clock: Clock) -> None:
    store = NonceStore(database, clock=clock)
    value = store.create().value

    def take(_: int) -> bool:
        try:
            store.consume(value)
        except NonceError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(64))) == 1


@pytest.mark.parametrize("value", [b"", b"x", bytes(31), bytes(33), bytes(10_000)])
def test_others_are_unknown(database: Database, value: bytes) -> None:
    with pytest.raises(NonceError, match="unknown"):
        NonceStore(database).consume(value)
