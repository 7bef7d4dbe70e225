"""What was opened before is remembered, and nothing older is opened after it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tensorguard.crypto import canonical
from tensorguard.errors import ConfigurationError, PackageRollbackError
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.rollback import MAX_FILE_BYTES, MAX_PACKAGES, RollbackGuard
from tests.package.conftest import Packed


def release(packed: Packed, sequence: int, **changes: Any) -> VerifiedManifest:
    """A release of the packed adapter."""
    manifest = packed.verified.manifest.model_copy(update={"sequence": sequence, **changes})
    return dataclasses.replace(packed.verified, manifest=manifest, digest=manifest.digest)


@pytest.mark.parametrize("kept", [True, False])
def test_older_releases_are_refused(packed: Packed, tmp_path: Path, kept: bool) -> None:
    file = tmp_path / "opened.json" if kept else None
    guard = RollbackGuard(file)
    guard.remember(release(packed, 2))
    if kept:
        guard = RollbackGuard(file)  # a restart
    for attempt in (guard.check, guard.remember):
        with pytest.raises(PackageRollbackError, match="older than 2") as refused:
            attempt(release(packed, 1))
        assert refused.value.reason == "package_rollback"
    guard.remember(release(packed, 2))
    guard.remember(release(packed, 5))
    with pytest.raises(PackageRollbackError, match="older than 5"):
        guard.check(release(packed, 4))


def test_a_sequence_has_one_manifest(packed: Packed, tmp_path: Path) -> None:
    guard = RollbackGuard(tmp_path / "opened.json")
    guard.remember(release(packed, 2))
    with pytest.raises(PackageRollbackError, match="another manifest"):
        guard.check(release(packed, 2, token_budget=7))


def test_packages_are_separate(packed: Packed, tmp_path: Path) -> None:
    guard = RollbackGuard(tmp_path / "opened.json")
    guard.remember(release(packed, 9))
    guard.remember(release(packed, 1, package_id="other"))
    guard.remember(release(packed, 1, tenant="other"))
    found = json.loads((tmp_path / "opened.json").read_bytes())
    assert [(item["tenant"], item["package_id"], item["sequence"]) for item in found["releases"]] == [
        ("acme", "law-style", 9),
        ("acme", "other", 1),
        ("other", "law-style", 1),
    ]


def test_checking_remembers_nothing(packed: Packed, tmp_path: Path) -> None:
    """A release counts when it was opened: a file that does not open must not keep an older one from being served."""
    guard = RollbackGuard(tmp_path / "opened.json")
    guard.check(release(packed, 9))
    guard.remember(release(packed, 1))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"format":"tssp-opened/v2","releases":[]}',
        b'{"format":"tssp-opened/v1","releases":[{"tenant":"acme"}]}',
        b'{"format":"tssp-opened/v1", "releases":[]}',
        b"[" * 2**20,
        canonical.dumps({"format": "tssp-opened/v1", "releases": [], "more": 1}),
        b" " * (MAX_FILE_BYTES + 1),
    ],
    ids=range(8),
)
def test_a_file_that_says_nothing_is_no_beginning(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "opened.json"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"opened\.json is not a record"):
        RollbackGuard(file)


def test_a_full_file_says_so(packed: Packed, tmp_path: Path) -> None:
    file = tmp_path / "opened.json"
    names = [f"{number:064}" for number in range(MAX_PACKAGES)]
    releases = [{"tenant": "a" * 64, "package_id": name, "sequence": 2**53 - 1, "digest": "ab" * 32} for name in names]
    file.write_bytes(canonical.dumps({"format": "tssp-opened/v1", "releases": releases}))
    guard = RollbackGuard(file)
    with pytest.raises(ConfigurationError, match="is full with 4096 packages"):
        guard.remember(release(packed, 1))
    assert b"law-style" not in file.read_bytes()


def test_what_cannot_be_written_is_not_opened(packed: Packed, tmp_path: Path) -> None:
    guard = RollbackGuard(tmp_path / "absent" / "opened.json")
    with pytest.raises(ConfigurationError, match="cannot write"):
        guard.remember(release(packed, 2))
    guard.check(release(packed, 1))  # nor is it remembered
