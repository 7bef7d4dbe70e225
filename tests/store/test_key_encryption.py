"""Key-encryption keys: files, environment, and that a wrapped secret opens only in its place."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, PackageKeyError
from tensorguard.store.key_encryption import LocalKey, open_key_encryption_key

SECRET = os.urandom(32)


def test_wraps_and_unwraps() -> None:
    key = LocalKey(bytes(range(32)))
    wrapped = key.wrap(SECRET, b"context")
    assert SECRET not in wrapped
    assert key.wrap(SECRET, b"context") != wrapped, "nonces are random"
    assert key.unwrap(wrapped, b"context") == SECRET


def test_every_flipped_byte_another_context_and_another_key_are_refused() -> None:
    key = LocalKey(bytes(range(32)))
    wrapped = key.wrap(SECRET, b"context")
    for position in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[position] ^= 1
        with pytest.raises(PackageKeyError):
            key.unwrap(bytes(changed), b"context")
    for attempt, context in ((key, b"other"), (LocalKey(bytes(32)), b"context")):
        with pytest.raises(PackageKeyError):
            attempt.unwrap(wrapped, context)
    for short in (b"", wrapped[:12], wrapped[:-1]):
        with pytest.raises(PackageKeyError):
            key.unwrap(short, b"context")


def test_a_file_is_made_once_with_its_mode(tmp_path: Path) -> None:
    name = f"file:{tmp_path}/kek"
    with pytest.raises(ConfigurationError, match="restore it"):
        open_key_encryption_key(name)
    made = open_key_encryption_key(name, create=True)
    assert stat.S_IMODE((tmp_path / "kek").stat().st_mode) == 0o600
    assert open_key_encryption_key(name, create=True).id == made.id == open_key_encryption_key(name).id


def test_a_file_that_others_can_read_or_of_another_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    path.write_bytes(bytes(32))
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        open_key_encryption_key(f"file:{path}")
    path.chmod(0o600)
    path.write_bytes(bytes(31))
    with pytest.raises(ConfigurationError, match="32 bytes, not 31"):
        open_key_encryption_key(f"file:{path}")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEK", raising=False)
    with pytest.raises(ConfigurationError, match=r"KEK.*is not set"):
        open_key_encryption_key("env:KEK")
    monkeypatch.setenv("KEK", base64.b64encode(bytes(32)).decode())
    assert open_key_encryption_key("env:KEK").id == LocalKey(bytes(32)).id
    for wrong in ("no base64!", base64.b64encode(bytes(16)).decode()):
        monkeypatch.setenv("KEK", wrong)
        with pytest.raises(ConfigurationError) as refused:
            open_key_encryption_key("env:KEK")
        assert wrong not in str(refused.value)


@pytest.mark.parametrize("name", ["", "kek", "file:", "env:", "aws:x", "vault:"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="write file:PATH"):
        open_key_encryption_key(name)


def test_the_id_does_not_tell_the_key() -> None:
    assert LocalKey(bytes(32)).id != LocalKey(bytes(31) + b"\x01").id
    assert bytes(32).hex()[:32] not in LocalKey(bytes(32)).id
