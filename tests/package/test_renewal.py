"""The same adapter under a new content key, and the same package under new signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorguard.crypto.aead import seal_part
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import (
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    PackageError,
    PackageKeyError,
    PackageTamperedError,
    PermissionDeniedError,
)
from tensorguard.package import sealing
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.package.reader import open_manifest, open_parts, read_adapter, read_parts
from tensorguard.package.renewal import rekey_package, sign_again
from tests.package.conftest import Packed


class Registrar:
    """Keeps what is registered."""

    def __init__(self) -> None:
        self.releases: list[dict[str, Any]] = []

    def __call__(self, **release: Any) -> None:
        self.releases.append(release)


def rekey(packed: Packed, output: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The new package and what was registered for it."""
    registrar = Registrar()
    arguments: dict[str, Any] = {
        "path": packed.path,
        "output": output,
        "verified": packed.verified,
        "content_key": packed.content_key,
        "sequence": 2,
        "signing_keys": packed.keys,
        "key_registrar": registrar,
    } | changes
    verified = rekey_package(**arguments)
    return verified, registrar.releases[0] if registrar.releases else {}


def test_rekeying_changes_key_and_sequence_and_nothing_of_the_adapter(packed: Packed, tmp_path: Path) -> None:
    output = tmp_path / "next.tssp"
    verified, release = rekey(packed, output)
    old, new = packed.verified.manifest, verified.manifest
    assert (new.sequence, release["sequence"]) == (2, 2)
    assert new.key_id != old.key_id and release["key_id"] == new.key_id
    assert release["content_key"] != packed.content_key
    assert release["manifest_digest"] == verified.digest != packed.verified.digest
    assert release["token_budget"] == new.token_budget == old.token_budget
    assert release["expires"] == new.expires
    for name in ("tenant", "package_id", "base_model", "peft", "moai", "release_policy"):
        assert getattr(new, name) == getattr(old, name)
    before = read_adapter(packed.path, packed.verified, packed.content_key)
    after = read_adapter(output, open_manifest(output, packed.keys.public), release["content_key"])
    assert after.u == before.u
    for one, other in zip(before.groups, after.groups, strict=True):
        assert np.array_equal(one.integers, other.integers)
    ciphertexts = list(read_parts(output, verified))
    assert all(a != b for a, b in zip(ciphertexts, read_parts(packed.path, packed.verified), strict=True))


def test_neither_key_opens_the_other_sequence(packed: Packed, tmp_path: Path) -> None:
    verified, release = rekey(packed, tmp_path / "next.tssp")
    with pytest.raises(PackageKeyError):
        read_adapter(tmp_path / "next.tssp", verified, packed.content_key)
    with pytest.raises(PackageKeyError):
        read_adapter(packed.path, packed.verified, release["content_key"])


def test_a_policy_can_be_named_anew(packed: Packed, tmp_path: Path) -> None:
    policy = ReleasePolicy(id="strict", sha256="ab" * 32)
    verified, release = rekey(packed, tmp_path / "next.tssp", release_policy=policy)
    assert verified.manifest.release_policy == policy and release["release_policy_sha256"] == policy.sha256


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sequence": 1}, PermissionDeniedError),
        ({"sequence": 0}, InvalidInputError),
        ({"life_seconds": 0}, InvalidInputError),
        ({"content_key": bytes(32)}, PackageKeyError),
    ],
)
def test_what_cannot_be_rekeyed_leaves_no_file(
    packed: Packed, tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        rekey(packed, tmp_path / "next.tssp", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_part_is_not_sealed_again(packed: Packed, tmp_path: Path) -> None:
    content = bytearray(packed.path.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / "changed.tssp"
    changed.write_bytes(content)
    with pytest.raises(PackageTamperedError) as refused:
        rekey(packed, tmp_path / "next.tssp", path=changed)
    assert refused.value.message.count(str(changed)) == 1
    with pytest.raises(PackageTamperedError):
        sign_again(changed, tmp_path / "next.tssp", packed.keys.public, SigningKeys.generate())
    assert list(tmp_path.iterdir()) == [changed]


def test_existing_files_are_not_overwritten(packed: Packed) -> None:
    before = packed.path.read_bytes()
    with pytest.raises(ConfigurationError, match="exists already"):
        rekey(packed, packed.path)
    with pytest.raises(ConfigurationError, match="exists already"):
        sign_again(packed.path, packed.path, packed.keys.public, SigningKeys.generate())
    assert packed.path.read_bytes() == before


def test_a_registrar_that_fails_leaves_no_file(packed: Packed, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise NotFoundError("no attestor")

    with pytest.raises(NotFoundError):
        rekey(packed, tmp_path / "next.tssp", key_registrar=refuse)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_neither_named_nor_registered(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = Registrar()
    monkeypatch.setattr(sealing, "seal_part", lambda key, context, plaintext: seal_part(key, context, plaintext[:-4]))
    with pytest.raises(PackageError, match="safetensors"):
        rekey(packed, tmp_path / "next.tssp", key_registrar=registrar)
    assert list(tmp_path.iterdir()) == [] and registrar.releases == []


def test_new_signatures_change_nothing_else(packed: Packed, tmp_path: Path) -> None:
    """So the attestor, which knows the manifest by its digest, releases the same key for it."""
    output, keys = tmp_path / "again.tssp", SigningKeys.generate()
    verified = sign_again(packed.path, output, [SigningKeys.generate().public, packed.keys.public], keys)
    assert verified.signer == keys.public.key_id != packed.verified.signer
    assert (verified.digest, verified.manifest) == (packed.verified.digest, packed.verified.manifest)
    assert open_parts(output, verified, packed.content_key) == open_parts(
        packed.path, packed.verified, packed.content_key
    )
    with pytest.raises(PackageError, match="not trusted here"):
        open_manifest(output, packed.keys.public)


def test_packages_of_strangers_are_not_signed(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not trusted here"):
        sign_again(packed.path, tmp_path / "again.tssp", SigningKeys.generate().public, packed.keys)
    assert list(tmp_path.iterdir()) == []
