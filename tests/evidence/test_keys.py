from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, TokenError
from tensorguard.evidence.keys import AttestorKey, KeySet


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    first = AttestorKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert AttestorKey.load_or_create(path).thumbprint == first.thumbprint
    assert "PRIVATE" not in repr(first)


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    AttestorKey.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        AttestorKey.load_or_create(path)


def test_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(os.urandom(100))
    path.chmod(0o600)
    with pytest.raises(ConfigurationError):
        AttestorKey.load_or_create(path)


def test_key_set_round_trip() -> None:
    key = AttestorKey.generate()
    data = key.key_set().to_jwks()
    assert KeySet.from_jwks(data).thumbprints == (key.thumbprint,)
    assert all("d" not in entry for entry in json.loads(data)["keys"])


def test_pin_keeps_one_key_only() -> None:
    ours, theirs = AttestorKey.generate(), AttestorKey.generate()
    both = KeySet([ours.private_key.public_key(), theirs.private_key.public_key()])
    assert both.only(ours.thumbprint).thumbprints == (ours.thumbprint,)
    with pytest.raises(TokenError):
        theirs.key_set().only(ours.thumbprint)


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
