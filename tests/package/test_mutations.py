"""No byte of a package is irrelevant: each one is changed, and the file is cut at each length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import PackageError
from tensorguard.package.envelope import SIGNATURES_BYTES
from tensorguard.package.reader import open_manifest, read_adapter

VECTORS = Path(__file__).parent / "vectors"
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


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


def test_the_second_form_of_an_ed25519_signature_is_refused(package: Opener) -> None:
    """S plus the group's order satisfies the equation, too; RFC 8032 wants S below it."""
    place = len(package.content) - sum_of_parts(package.content) - SIGNATURES_BYTES + 32 + 32
    scalar = int.from_bytes(package.content[place : place + 32], "little")
    assert 0 < scalar < ED25519_ORDER
    second = (scalar + ED25519_ORDER).to_bytes(32, "little")
    assert package.reason(package.content[:place] + second + package.content[place + 32 :]) == "package_tampered"


@pytest.mark.parametrize("half", [slice(32, 96), slice(96, None)], ids=["Ed25519", "ML-DSA-65"])
def test_one_signature_alone_is_not_enough(package: Opener, half: slice) -> None:
    """The other one is of the right key over this very manifest."""
    end = len(package.content) - sum_of_parts(package.content)
    signatures = bytearray(package.content[end - SIGNATURES_BYTES : end])
    signatures[half] = bytes(len(signatures[half]))
    changed = package.content[: end - SIGNATURES_BYTES] + signatures + package.content[end:]
    assert package.reason(changed) == "package_tampered"


def sum_of_parts(content: bytes) -> int:
    length = int.from_bytes(content[8:12], "little")
    return sum(part["size"] for part in json.loads(content[16 : 16 + length])["parts"])
