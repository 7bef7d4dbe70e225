"""Vault's transit engine as a key-encryption key, against a small server that answers like it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, PackageKeyError, UnavailableError
from tensorguard.store.key_encryption import open_key_encryption_key
from tensorguard.store.state import AttestorState
from tests.support.vault import FakeVault, running_vault

SECRET = os.urandom(32)


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVault]:
    with running_vault() as running:
        monkeypatch.setenv("VAULT_TOKEN", running.token)
        yield running


def name(vault: FakeVault) -> str:
    return f"vault:{vault.address}/transit/tensafe"


def test_wraps_and_unwraps_bound_to_the_context(vault: FakeVault) -> None:
    key = open_key_encryption_key(name(vault))
    wrapped = key.wrap(SECRET, b"context")
    assert wrapped.startswith(b"vault:v1:")
    assert key.unwrap(wrapped, b"context") == SECRET
    for attempt, context in ((wrapped, b"other"), (wrapped[:-8] + b"AAAAAAA=", b"context"), (b"x", b"context")):
        with pytest.raises(PackageKeyError):
            key.unwrap(attempt, context)


def test_a_vault_that_does_not_bind_is_refused(vault: FakeVault) -> None:
    vault.ignores_associated_data = True
    with pytest.raises(ConfigurationError, match=r"ignores associated_data.*1\.13"):
        open_key_encryption_key(name(vault)).wrap(SECRET, b"context")


def test_binding_is_tried_once(vault: FakeVault) -> None:
    key = open_key_encryption_key(name(vault))
    for _ in range(3):
        key.wrap(SECRET, b"context")
    assert [path.split("/")[3] for path, _ in vault.requests] == ["encrypt", "decrypt", "encrypt", "encrypt"]


def test_an_attestor_keeps_its_keys_there(vault: FakeVault, folder: Path) -> None:
    with AttestorState.open(folder) as state:
        state.packages.register("1" * 64, "acme", "law", 1, "2" * 32, SECRET, 10, 2_000_000_000)
        assert state.rotate_key_encryption_key(name(vault)) == 3
    with AttestorState.open(folder, key_encryption_key=name(vault)) as state:
        assert state.packages.lookup("acme", "law", 1, "1" * 64).content_key == SECRET
    assert {path for path, _ in vault.requests} == {"/v1/transit/encrypt/tensafe", "/v1/transit/decrypt/tensafe"}


def test_a_refused_token_and_a_missing_key_are_configuration(vault: FakeVault, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="HTTP 404"):
        open_key_encryption_key(f"vault:{vault.address}/transit/other").wrap(SECRET, b"")
    monkeypatch.setenv("VAULT_TOKEN", "s.wrong")
    with pytest.raises(ConfigurationError, match="HTTP 403") as refused:
        open_key_encryption_key(name(vault)).wrap(SECRET, b"")
    assert "s.wrong" not in str(refused.value)
    monkeypatch.delenv("VAULT_TOKEN")
    monkeypatch.delenv("VAULT_TOKEN_FILE", raising=False)
    with pytest.raises(ConfigurationError, match="no Vault token"):
        open_key_encryption_key(name(vault))


def test_the_token_of_an_agents_file(vault: FakeVault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VAULT_TOKEN")
    path = tmp_path / "token"
    path.write_text(vault.token + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("VAULT_TOKEN_FILE", str(path))
    open_key_encryption_key(name(vault)).wrap(SECRET, b"")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        open_key_encryption_key(name(vault))


@pytest.mark.parametrize("status", [500, 503, 307])
def test_a_sealed_vault_is_unavailable(vault: FakeVault, status: int) -> None:
    vault.status = status
    with pytest.raises(UnavailableError, match=f"HTTP {status}"):
        open_key_encryption_key(name(vault)).wrap(SECRET, b"")


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b'{"data":{}}', b'{"data":{"ciphertext":1}}', b"x" * 100_000])
def test_a_strange_answer_is_unavailable(vault: FakeVault, body: bytes) -> None:
    vault.body = body
    with pytest.raises(UnavailableError):
        open_key_encryption_key(name(vault)).wrap(SECRET, b"")


def test_no_vault_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "s.x")
    with pytest.raises(UnavailableError, match="does not answer"):
        open_key_encryption_key("vault:http://127.0.0.1:1/transit/tensafe").wrap(SECRET, b"")


@pytest.mark.parametrize(
    "location",
    ["http://vault.example/transit/k", "https://vault.example/k", "https://u:p@vault.example/t/k", "ftp://h/t/k", "x"],
)
def test_other_locations_are_refused(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "s.x")
    with pytest.raises(ConfigurationError):
        open_key_encryption_key(f"vault:{location}")
