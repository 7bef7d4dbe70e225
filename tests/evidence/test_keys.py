from __future__ import annotations

import json

import pytest

from tensorguard.errors import TokenError
from tensorguard.evidence.keys import AttestorKey, KeySet


def test_key_is_not_shown() -> None:
    key = AttestorKey.generate()
    assert repr(key) == f"AttestorKey({key.thumbprint})"


def test_key_set_round_trip() -> None:
    key = AttestorKey.generate()
    data = key.key_set().to_jwks()
    assert KeySet.from_jwks(data).thumbprints == (key.thumbprint,)
    assert all("d" not in entry for entry in json.loads(data)["keys"])


def test_pin_keeps_one_key_only() -> None:
    ours, theirs = AttestorKey.generate(), AttestorKey.generate()
    both = KeySet([ours.private_key.public_key(), theirs.private_key.public_key()])
    assert both.only([ours.thumbprint]).thumbprints == (ours.thumbprint,)
    with pytest.raises(TokenError):
        theirs.key_set().only([ours.thumbprint])


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "RSA"},
        {"crv": "P-384"},
        {"d": "AAAA"},
        {"x": "A" * 43},
        {"x": 1},
        {"kid": "another"},
    ],
)
def test_malformed_entries_are_refused(change: dict[str, object]) -> None:
    entry = {**json.loads(AttestorKey.generate().key_set().to_jwks())["keys"][0], **change}
    with pytest.raises(TokenError):
        KeySet.from_jwks(json.dumps({"keys": [entry]}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"keys":[]}', b'{"keys":1}', b"[" * 5000, b" " * 70_000])
def test_malformed_sets_are_refused(data: bytes) -> None:
    with pytest.raises(TokenError):
        KeySet.from_jwks(data)
