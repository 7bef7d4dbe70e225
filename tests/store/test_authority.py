"""The authority at rest, and its rotation: who issues when, and who is trusted until when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import func, select, update

from tensorguard.errors import ConfigurationError, PackageKeyError
from tensorguard.rpc.certificates import MAX_AUTHORITIES, Authority
from tensorguard.store.audit import records_of
from tensorguard.store.schema import AUTHORITY
from tensorguard.store.signing_keys import LOOK_SECONDS
from tensorguard.store.state import AttestorState


def test_it_stays_the_same_through_restarts_and_rotations_of_the_key_encryption_key(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        pem = state.authority.pem
        state.rotate_key_encryption_key(f"file:{folder}/new")
    with AttestorState.open(folder, key_encryption_key=f"file:{folder}/new") as state:
        assert state.authority.pem == pem
        assert state.authority.private_key.public_key() == state.authority.certificate.public_key()


def test_its_key_is_in_no_file(folder: Path) -> None:
    with AttestorState.open(folder) as state:
        private = state.authority.private_key.private_numbers().private_value.to_bytes(32, "big")
        for path in folder.iterdir():
            assert private not in path.read_bytes(), path


def test_another_certificate_in_the_row_is_refused(folder: Path) -> None:
    """Who can write the database cannot put an authority of his own in its place."""
    with AttestorState.open(folder) as state, state.database.writing() as connection:
        other = Authority.generate(0)
        connection.execute(update(AUTHORITY).values(certificate=other.certificate.public_bytes(Encoding.DER)))
    with pytest.raises(PackageKeyError):
        AttestorState.open(folder)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(folder: Path, clock: Clock) -> Iterator[AttestorState]:
    with AttestorState.open(folder, clock=clock) as opened:
        yield opened


def fingerprints(state: AttestorState) -> tuple[str, ...]:
    return tuple(authority.fingerprint for authority in state.authorities.trusted())


def test_an_authority_is_announced_issues_and_is_trusted_alone(state: AttestorState, clock: Clock) -> None:
    old = state.authority.fingerprint
    assert fingerprints(state) == (old,)
    new = state.rotate_authority(3600, 600).fingerprint
    begins = clock.now + 3600
    for at, current, trusted in (
        (begins - 3600, old, (old, new)),
        (begins - 1, old, (old, new)),
        (begins, new, (old, new)),
        (begins + 599, new, (old, new)),
        (begins + 600, new, (new,)),
    ):
        clock.now = at
        assert (state.authority.fingerprint, fingerprints(state)) == (current, trusted), at
        assert state.authorities.pem.count(b"BEGIN CERTIFICATE") == len(trusted)


def test_without_overlap_the_old_one_is_refused_at_once(state: AttestorState, clock: Clock) -> None:
    """For one whose key has leaked."""
    clock.now += 10
    new = state.rotate_authority(0, 0).fingerprint
    clock.now += 1
    assert fingerprints(state) == (new,) == (state.authority.fingerprint,)


def test_one_rotation_at_a_time_and_few_in_a_row(state: AttestorState, clock: Clock) -> None:
    state.rotate_authority(60, 3600)
    with pytest.raises(ConfigurationError, match="announced"):
        state.rotate_authority(60, 3600)
    for _ in range(MAX_AUTHORITIES - 2):
        clock.now += 60
        state.rotate_authority(60, 3600)
    clock.now += 60
    with pytest.raises(ConfigurationError, match="retired"):
        state.rotate_authority(60, 3600)


def test_keys_that_issue_no_more_are_removed(state: AttestorState, clock: Clock) -> None:
    for _ in range(4):
        state.rotate_authority(60, 60)
        clock.now += 3600
    with state.database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(AUTHORITY)).scalar_one() == 2
    assert len(fingerprints(state)) == 1


def test_another_attestor_on_the_database_takes_it_by_itself(folder: Path, state: AttestorState, clock: Clock) -> None:
    with AttestorState.open(folder, clock=clock) as other:
        new = state.rotate_authority(60, 60).fingerprint
        clock.now += LOOK_SECONDS
        assert fingerprints(other) == fingerprints(state)
        clock.now += 60
        assert other.authority.fingerprint == new


def test_a_rotation_is_recorded_and_survives_that_of_the_key_encryption_key(
    folder: Path, state: AttestorState, clock: Clock
) -> None:
    new = state.rotate_authority(60, 30).fingerprint
    with state.database.reading() as connection:
        record = json.loads(list(records_of(connection))[-1])
    assert (record["event"], record["new"]) == ("rotate_authority", new)
    assert (record["issues_from"], record["alone_from"]) == (clock.now + 60, clock.now + 90)
    before = state.authorities.pem
    state.rotate_key_encryption_key(f"file:{folder}/new")
    assert state.authorities.pem == before
    with AttestorState.open(folder, key_encryption_key=f"file:{folder}/new", clock=clock) as again:
        assert again.authorities.pem == before


def test_keys_of_two_authorities_cannot_be_exchanged(folder: Path, state: AttestorState) -> None:
    state.rotate_authority(60, 60)
    with state.database.writing() as connection:
        rows = connection.execute(AUTHORITY.select()).all()
        connection.execute(AUTHORITY.update().values(wrapped_key=rows[0].wrapped_key))
    with pytest.raises(PackageKeyError):
        AttestorState.open(folder)
