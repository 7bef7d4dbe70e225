"""Enrolment secrets: one certificate each, in time, and never for a role that has to be attested."""

from __future__ import annotations

import pytest

from tensorguard.errors import AuthenticationError, ConfigurationError
from tensorguard.rpc.certificates import ServiceName
from tensorguard.store.database import Database
from tensorguard.store.enrolments import create_enrolment, use_enrolment
from tensorguard.store.schema import ENROLMENTS

NOW = 1_800_000_000
GATEWAY = ServiceName("gateway")


def created(database: Database, *, expires_at: int = NOW + 60) -> str:
    with database.writing() as connection:
        return create_enrolment(connection, GATEWAY, expires_at=expires_at)


def used(database: Database, secret: str, now: int = NOW) -> ServiceName:
    with database.writing() as connection:
        return use_enrolment(connection, secret, now)


def test_a_secret_is_good_once(database: Database) -> None:
    secret = created(database)
    assert used(database, secret) == GATEWAY
    with pytest.raises(AuthenticationError, match="tensafe attestor enrol"):
        used(database, secret)


@pytest.mark.parametrize("wrong", ["", "x", "x" * 10_000])
def test_another_secret_is_refused(database: Database, wrong: str) -> None:
    secret = created(database)
    for guess in (wrong, secret[:-1], secret + "x", secret.upper()):
        with pytest.raises(AuthenticationError):
            used(database, guess)
    assert used(database, secret) == GATEWAY


def test_a_secret_ends(database: Database) -> None:
    secret = created(database)
    with pytest.raises(AuthenticationError):
        used(database, secret, NOW + 60)


@pytest.mark.parametrize("role", ["coprocessor", "inference", "attestor", ""])
def test_attested_roles_are_not_enrolled(database: Database, role: str) -> None:
    with database.writing() as connection, pytest.raises(ConfigurationError, match="attested"):
        create_enrolment(connection, ServiceName(role), expires_at=NOW + 60)
    # And not by who can write the database either.
    secret = created(database)
    with database.writing() as connection:
        connection.execute(ENROLMENTS.update().values(role=role))
    with pytest.raises(AuthenticationError):
        used(database, secret)


def test_the_secret_is_not_in_the_database(database: Database) -> None:
    secret = created(database)
    with database.reading() as connection:
        assert secret not in str(connection.execute(ENROLMENTS.select()).all())
