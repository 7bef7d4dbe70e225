from __future__ import annotations

import dataclasses
import hashlib

import pytest

from tensorguard.errors import InvalidInputError
from tensorguard.evidence import transcript as encoding
from tensorguard.session.transcript import SessionTranscript, join_basis, split_basis

BASE = SessionTranscript(
    tenant="t",
    parameter_set="n4096-q90-w12",
    session_id=b"s" * 16,
    host_nonce=b"h" * 32,
    coprocessor_nonce=b"c" * 32,
    host_token="host",
    coprocessor_token="coprocessor",
)
CHANGES: list[dict[str, object]] = [
    {"tenant": "u"},
    {"parameter_set": "n4096-q90-w13"},
    {"session_id": b"S" * 16},
    {"host_nonce": b"H" * 32},
    {"coprocessor_nonce": b"C" * 32},
    {"host_token": "other"},
    {"coprocessor_token": "other"},
    {"host_nonce": b"c" * 32, "coprocessor_nonce": b"h" * 32},
    {"host_token": "coprocessor", "coprocessor_token": "host"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_everything_is_signed(change: dict[str, object]) -> None:
    other = dataclasses.replace(BASE, **change)  # type: ignore[arg-type]
    assert other.digest != BASE.digest
    assert other.coprocessor_statement() != BASE.coprocessor_statement()
    assert other.host_key_statement(0, b"pk") != BASE.host_key_statement(0, b"pk")
    assert other.basis_info("a", "d") != BASE.basis_info("a", "d")


@pytest.mark.parametrize("change", [CHANGES[1], CHANGES[3], CHANGES[4], CHANGES[7]], ids=str)
def test_pk1_depends_on_both_nonces_and_the_parameters(change: dict[str, object]) -> None:
    other = dataclasses.replace(BASE, **change)  # type: ignore[arg-type]
    assert other.pk1_seed(0) != BASE.pk1_seed(0)


def test_statements_differ_by_key_and_purpose() -> None:
    statements = [
        BASE.coprocessor_statement(),
        BASE.host_key_statement(0, b"pk"),
        BASE.host_key_statement(1, b"pk"),
        BASE.host_key_statement(0, b"kp"),
        BASE.basis_info("a", "d"),
        BASE.basis_info("b", "d"),
        BASE.basis_info("a", "e"),
        BASE.basis_statement("a", "d", b""),
        BASE.basis_statement("a", "d", b"x"),
    ]
    assert len(set(statements)) == len(statements)
    assert len({BASE.pk1_seed(number) for number in range(5)}) == 5


def test_known_vector_of_pk1_seed() -> None:
    """Spelt out as docs/protocol-session.md has it."""
    fields = [b"tensafe-session/v1/pk1", b"h" * 32, b"c" * 32, b"n4096-q90-w12", (3).to_bytes(8, "big")]
    expected = hashlib.sha3_256(b"".join(len(field).to_bytes(4, "big") + field for field in fields)).digest()
    assert BASE.pk1_seed(3) == expected
    assert encoding.encode("a", 1) == b"\0\0\0\x01a\0\0\0\x08\0\0\0\0\0\0\0\x01"


def test_reflected_nonce_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="our own nonce"):
        dataclasses.replace(BASE, coprocessor_nonce=BASE.host_nonce)


@pytest.mark.parametrize("change", [{"session_id": b""}, {"host_nonce": b"x"}, {"coprocessor_nonce": b"x" * 33}])
def test_lengths(change: dict[str, bytes]) -> None:
    with pytest.raises(InvalidInputError):
        dataclasses.replace(BASE, **change)  # type: ignore[arg-type]


def test_basis_plaintext() -> None:
    assert split_basis(join_basis(b"sig", b"basis")) == (b"sig", b"basis")
    for bad in (b"", b"\0", b"\0\x05abc"):
        with pytest.raises(InvalidInputError):
            split_basis(bad)
