"""No byte of a package is irrelevant: each one is changed, and the file is cut at each length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import PackageError
from tensorguard.package.reader import open_manifest, read_adapter

VECTORS = Path(__file__).parent / "vectors"


class Opener:
    """Opens variants of one stored package as a coprocessor does, with the right keys."""

    def __init__(self, name: str, path: Path) -> None:
        self.content = (VECTORS / f"{name}.tssp").read_bytes()
        self.key = bytes.fromhex(json.loads((VECTORS / f"{name}.json").read_text())["content_key"])
        self.trusted = VerifyingKeys.read(VECTORS / f"{name}.pub.pem")
        self._path = path

    def reason(self, content: bytes) -> str:
        """Why the content is refused; empty when it is accepted."""
        self._path.write_bytes(content)
        try:
            verified = open_manifest(self._path, self.trusted)
            read_adapter(self._path, verified, self.key, now=verified.manifest.created)
        except PackageError as error:
            return error.reason
        return ""


@pytest.fixture
def package(tmp_path: Path) -> Opener:
    return Opener("tiny", tmp_path / "changed.tssp")


def test_no_byte_can_be_changed(package: Opener) -> None:
    """Header and signer are refused as no package of ours, everything else as tampered. No byte is irrelevant."""
    assert package.reason(package.content) == ""
    manifest = int.from_bytes(package.content[8:12], "little")
    signed = 16 + manifest
    for position in range(len(package.content)):
        changed = bytearray(package.content)
        changed[position] ^= 1 << position % 8
        expected = "package" if position < 16 or signed <= position < signed + 32 else "package_tampered"
        assert package.reason(bytes(changed)) == expected, f"byte {position}"


def test_no_length_but_its_own_is_accepted(package: Opener) -> None:
    for length in range(len(package.content)):
        assert package.reason(package.content[:length]) in ("package", "package_tampered"), length
    for more in (b"\0", b"TSSP", package.content):
        assert package.reason(package.content + more) == "package_tampered"


EDITS = json.loads((VECTORS / "refused.json").read_text())["edits"]


@pytest.mark.parametrize("edit", EDITS, ids=[edit["what"] for edit in EDITS])
def test_the_edits_for_other_readers_are_refused(package: Opener, edit: dict[str, Any]) -> None:
    changed = bytearray(package.content)[: edit.get("length")]
    data = bytes.fromhex(edit.get("bytes", ""))
    changed[edit.get("offset", 0) : edit.get("offset", 0) + len(data)] = data
    assert changed != package.content
    assert package.reason(bytes(changed)) == edit["reason"]
