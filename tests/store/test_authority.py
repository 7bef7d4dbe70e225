"""The authority at rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import update

from tensorguard.errors import PackageKeyError
from tensorguard.rpc.certificates import Authority
from tensorguard.store.schema import AUTHORITY
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
