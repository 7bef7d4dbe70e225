"""Signing keys: who signs when, who verifies until when, and that several attestors agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, PackageKeyError
from tensorguard.store.audit import records_of, verify_records
from tensorguard.store.schema import SIGNING_KEYS
from tensorguard.store.signing_keys import LOOK_SECONDS, RETIRED_SECONDS
from tensorguard.store.state import AttestorState


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(folder: Path, clock: Clock) -> Iterator[AttestorState]:
    with AttestorState.open(folder, clock=clock) as opened:
        yield opened


def test_a_key_is_announced_signs_and_retires(state: AttestorState, clock: Clock) -> None:
    old = state.keys.current.thumbprint
    assert state.keys.valid().thumbprints == (old,)
    new = state.rotate_signing_key(3600).thumbprint
    begins = clock.now + 3600
    for at, current, valid in (
        (begins - 3600, old, (old, new)),
        (begins - 1, old, (old, new)),
        (begins, new, (old, new)),
        (begins + RETIRED_SECONDS - 1, new, (old, new)),
        (begins + RETIRED_SECONDS, new, (new,)),
    ):
        clock.now = at
        assert (state.keys.current.thumbprint, state.keys.valid().thumbprints) == (current, valid), at
    assert set(state.key_set().thumbprints) == {old, new}


def test_keys_that_were_retired_long_ago_verify_no_token(state: AttestorState, clock: Clock) -> None:
    for _ in range(4):
        state.rotate_signing_key(60)
        clock.now += 3600
    assert state.keys.valid().thumbprints == (state.keys.current.thumbprint,)
    assert len(state.key_set().thumbprints) == 5


def test_without_overlap_the_new_key_signs_at_once(state: AttestorState, clock: Clock) -> None:
    clock.now += 10
    new = state.rotate_signing_key(0)
    clock.now += 1
    assert state.keys.current.thumbprint == new.thumbprint
    assert len(state.keys.valid().thumbprints) == 2, "tokens of a minute ago still verify"


def test_one_rotation_at_a_time(state: AttestorState, clock: Clock) -> None:
    state.rotate_signing_key(60)
    with pytest.raises(ConfigurationError, match="announced"):
        state.rotate_signing_key(60)
    clock.now += 60
    state.rotate_signing_key(60)


def test_another_attestor_on_the_database_takes_the_key_by_itself(
    folder: Path, state: AttestorState, clock: Clock
) -> None:
    with AttestorState.open(folder, clock=clock) as other:
        new = state.rotate_signing_key(60).thumbprint
        clock.now += LOOK_SECONDS
        assert new in other.keys.valid().thumbprints
        clock.now += 60
        assert other.keys.current.thumbprint == state.keys.current.thumbprint == new


def test_the_rotation_is_recorded_and_old_records_verify(folder: Path, state: AttestorState, clock: Clock) -> None:
    old = state.key.thumbprint
    new = state.rotate_signing_key(60).thumbprint
    clock.now += 60
    with AttestorState.open(folder, clock=clock) as again:
        assert again.key.thumbprint == new
        again.audit.append("attest", {})
        with again.database.reading() as connection:
            lines = list(records_of(connection))
        verify_records(lines, again.key_set())
        records = [json.loads(line) for line in lines]
        assert [(item["event"], item["key"]) for item in records] == [("rotate_signing_key", old), ("attest", new)]
        assert records[0]["new"] == new


def test_an_edited_row_is_refused(folder: Path, state: AttestorState) -> None:
    state.rotate_signing_key(60)
    with state.database.writing() as connection:
        rows = connection.execute(SIGNING_KEYS.select()).all()
        connection.execute(SIGNING_KEYS.update().values(wrapped_key=rows[0].wrapped_key))
    with pytest.raises(PackageKeyError):
        AttestorState.open(folder)
