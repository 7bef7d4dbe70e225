"""The registry of content keys: what it stores, what it refuses, and that its rows cannot be edited."""

from __future__ import annotations

import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tensorguard.errors import (
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    PackageKeyError,
    PermissionDeniedError,
)
from tensorguard.store.database import FILE_NAME
from tensorguard.store.packages import PackageKeyRegistry
from tensorguard.store.state import AttestorState

DIGEST = "ab" * 32
KEY = bytes(range(32))


def release(**changes: Any) -> dict[str, Any]:
    sequence = changes.get("sequence", 1)
    return {
        "manifest_digest": f"{sequence:064x}",
        "tenant": "acme",
        "package_id": "law-style",
        "sequence": sequence,
        "key_id": f"{sequence:032x}",
        "content_key": KEY,
        "token_budget": 1000,
        "expires": 2_000_000_000,
    } | changes


@pytest.fixture
def registry(tmp_path: Path) -> PackageKeyRegistry:
    return AttestorState.open(tmp_path / "attestor").packages


def test_returns_what_was_registered(registry: PackageKeyRegistry, tmp_path: Path) -> None:
    stored = registry.register(**release())
    found = AttestorState.open(tmp_path / "attestor").packages.lookup("acme", "law-style", 1, f"{1:064x}")
    assert found == stored
    assert found.content_key == KEY
    assert found.token_budget == 1000


def test_files_are_private_and_hold_no_key(registry: PackageKeyRegistry, tmp_path: Path) -> None:
    registry.register(**release())
    for name in (FILE_NAME, "kek", "audit.head"):
        path = tmp_path / "attestor" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert KEY not in path.read_bytes()


def test_key_is_not_shown(registry: PackageKeyRegistry) -> None:
    assert "content_key" not in repr(registry.register(**release()))


def test_registering_the_same_release_again_changes_nothing(registry: PackageKeyRegistry) -> None:
    assert registry.register(**release()) == registry.register(**release())


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest_digest": DIGEST},
        {"content_key": bytes(32)},
        {"manifest_digest": DIGEST, "key_id": "cd" * 16},
    ],
)
def test_a_sequence_is_used_once(registry: PackageKeyRegistry, changes: dict[str, Any]) -> None:
    registry.register(**release())
    with pytest.raises(PermissionDeniedError, match="sequence above 1"):
        registry.register(**release(**changes))


def test_older_sequences_are_refused(registry: PackageKeyRegistry) -> None:
    registry.register(**release(sequence=5))
    with pytest.raises(PermissionDeniedError, match="above 5"):
        registry.register(**release(sequence=4))
    registry.register(**release(sequence=6))
    assert registry.newest_sequence("acme", "law-style") == 6
    assert registry.newest_sequence("acme", "other") is None


def test_tenants_are_separate(registry: PackageKeyRegistry) -> None:
    registry.register(**release(sequence=5))
    registry.register(**release(sequence=1, tenant="other"))
    with pytest.raises(NotFoundError):
        registry.lookup("other", "law-style", 5, f"{5:064x}")


@pytest.mark.parametrize("changes", [{"manifest_digest": f"{1:064x}"}, {"key_id": f"{1:032x}"}])
def test_a_digest_or_key_belongs_to_one_package(registry: PackageKeyRegistry, changes: dict[str, Any]) -> None:
    registry.register(**release())
    with pytest.raises(PermissionDeniedError):
        registry.register(**release(sequence=2, **changes))


def test_lookup_needs_the_exact_manifest(registry: PackageKeyRegistry) -> None:
    registry.register(**release())
    with pytest.raises(NotFoundError):
        registry.lookup("acme", "law-style", 1, DIGEST)
    with pytest.raises(NotFoundError):
        registry.lookup("acme", "law-style", 2, f"{1:064x}")


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "Acme"},
        {"tenant": ""},
        {"tenant": "acme\n"},
        {"package_id": "a/b"},
        {"package_id": "x" * 65},
        {"sequence": 0},
        {"sequence": True},
        {"sequence": 2**53},
        {"manifest_digest": "AB" * 32},
        {"manifest_digest": DIGEST[:-2]},
        {"key_id": "xyz"},
        {"content_key": b"short"},
        {"token_budget": 0},
        {"expires": -1},
    ],
)
def test_malformed_values_are_refused(registry: PackageKeyRegistry, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        registry.register(**(release(sequence=1) | changes))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("token_budget", 10**9),
        ("expires_at", 2**40),
        ("key_id", "ee" * 16),
        ("registered_at", 1),
        ("release_policy_sha256", DIGEST),
    ],
)
def test_an_edited_row_gives_no_key(registry: PackageKeyRegistry, tmp_path: Path, column: str, value: Any) -> None:
    registry.register(**release())
    with sqlite3.connect(tmp_path / "attestor" / FILE_NAME) as connection:
        connection.execute(f"UPDATE packages SET {column} = ?", (value,))
    with pytest.raises(PackageKeyError):
        registry.lookup("acme", "law-style", 1, f"{1:064x}")


def test_a_key_moved_to_another_row_gives_no_key(registry: PackageKeyRegistry, tmp_path: Path) -> None:
    registry.register(**release(sequence=1))
    registry.register(**release(sequence=2))
    with sqlite3.connect(tmp_path / "attestor" / FILE_NAME) as connection:
        connection.execute("UPDATE packages SET wrapped_key = (SELECT wrapped_key FROM packages WHERE sequence = 1)")
    with pytest.raises(PackageKeyError):
        registry.lookup("acme", "law-style", 2, f"{2:064x}")


def test_a_lost_or_other_kek_is_refused(registry: PackageKeyRegistry, tmp_path: Path) -> None:
    registry.register(**release())
    kek = tmp_path / "attestor" / "kek"
    kek.unlink()
    with pytest.raises(ConfigurationError, match="restore it"):
        AttestorState.open(tmp_path / "attestor")
    kek.write_bytes(os.urandom(32))
    kek.chmod(0o600)
    with pytest.raises(ConfigurationError, match="wrapped under the key-encryption key"):
        AttestorState.open(tmp_path / "attestor")


def test_another_tenants_package_looks_like_none(registry: PackageKeyRegistry) -> None:
    registry.register(**release(tenant="other"))
    messages = set()
    for digest in (f"{1:064x}", DIGEST):
        with pytest.raises(NotFoundError) as refused:
            registry.lookup("acme", "law-style", 1, digest)
        messages.add(refused.value.message)
    assert len(messages) == 1


def test_one_of_many_concurrent_registrations_wins(registry: PackageKeyRegistry) -> None:
    def attempt(number: int) -> bool:
        try:
            registry.register(**release(manifest_digest=f"{number:064x}", key_id=f"{number:032x}"))
        except PermissionDeniedError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(100, 108))) == 1
