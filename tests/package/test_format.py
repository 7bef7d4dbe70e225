"""The bytes of version 1 stay as they are: stored packages are read by the library, and by a reader written from
docs/tssp.md alone, which shares no code with it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tensorguard.crypto.aead import derive_key
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.package.inspection import read_unverified
from tensorguard.package.parts import context_of
from tensorguard.package.reader import open_manifest, open_parts, read_adapter
from tests.package.conftest import Packed
from tests.package.independent_reader import independent_reader
from tests.package.make_vectors import PACKAGES, describe

VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(params=PACKAGES)
def stored(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    """A stored package and what a reader finds in it."""
    return VECTORS / f"{request.param}.tssp", json.loads((VECTORS / f"{request.param}.json").read_text())


def test_a_stored_package_reads_as_ever(stored: tuple[Path, dict[str, Any]]) -> None:
    path, expected = stored
    verified = open_manifest(path, VerifyingKeys.read(path.with_suffix(".pub.pem")))
    assert (verified.digest, verified.signer) == (expected["manifest_sha256"], expected["signer"])
    key = bytes.fromhex(expected["content_key"])
    contents = read_adapter(path, verified, key, now=verified.manifest.created)
    assert len(contents.groups) == 1
    plain = open_parts(path, verified, key)
    assert {role: hashlib.sha256(data).hexdigest() for role, data in plain.items()} == {
        role: part["plaintext_sha256"] for role, part in expected["parts"].items()
    }
    assert contents.u == plain.get("basis", b"")


def test_a_stored_package_reads_as_the_document_says(stored: tuple[Path, dict[str, Any]]) -> None:
    path, expected = stored
    key = bytes.fromhex(expected["content_key"])
    manifest, plain = independent_reader(path.read_bytes(), path.with_suffix(".pub.pem").read_bytes(), key)
    assert describe(path.read_bytes(), key, plain) == expected
    assert plain.keys() == expected["parts"].keys()
    (group,) = manifest["moai"]["groups"]
    rows = sum(info["rank"] for info in group["projections"])
    weights = load(plain["weights"])
    assert weights["layer.0.qkv"].shape == (rows, 48)
    if manifest["moai"]["mode"] == "factored":
        assert {name: u.shape for name, u in load(plain["basis"]).items()} == {
            f"layer.0.{info['name']}": (info["d_out"], info["rank"]) for info in group["projections"]
        }
    assert float(group["norm_bound"]) == 2**12 * np.sqrt(48 * (2 if "basis" in plain else 16))
    assert manifest["peft"]["alpha"] == "3.0"


def test_the_keys_of_parts_are_those_of_the_vectors(stored: tuple[Path, dict[str, Any]]) -> None:
    path, expected = stored
    manifest = read_unverified(path).manifest
    for part in manifest.parts:
        context = context_of(manifest, part)
        assert context.decode() == expected["parts"][part.role]["context"]
        key = derive_key(bytes.fromhex(expected["content_key"]), context)
        assert key.hex() == expected["parts"][part.role]["key"]


def test_a_new_package_reads_as_the_document_says(packed: Packed) -> None:
    manifest, plain = independent_reader(packed.path.read_bytes(), packed.keys.public.to_pem(), packed.content_key)
    assert manifest["package_id"] == "law-style"
    assert set(load(plain["weights"])) == {"layer.0.qkv", "layer.0.down", "layer.1.qkv", "layer.1.down"}
