"""No byte of an accepted quote can be changed. Trailing padding is the caller's buffer, not part of the quote."""

from __future__ import annotations

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.tdx.verifier import INTEL_SGX_ROOT_CA, TdxVerifier
from tests.support.attestation_vectors import vector_directory
from tests.support.synthetic_pki.tdx import NOW, Collateral, Pki, Quote


def accepted_mutations(root: str, quote: bytes, files: list[bytes], at: float) -> list[int]:
    """Positions at which one changed bit leaves the quote accepted; a different bit at each position."""
    verifier = TdxVerifier((root,))
    verifier.verify(quote, files, at=at)
    found = []
    for position in range(len(quote)):
        mutated = bytearray(quote)
        mutated[position] ^= 1 << position % 8
        try:
            verifier.verify(bytes(mutated), files, at=at)
        except EvidenceRefusedError:
            continue
        found.append(position)
    return found


@pytest.mark.parametrize("version", [4, 5])
def test_of_a_made_up_quote(version: int) -> None:
    quote = Quote(version=version).encode()
    assert accepted_mutations(Pki().root_fingerprint, quote, [Collateral().bundle()], NOW) == []


def test_of_a_real_quote() -> None:
    """With its 70 bytes of padding."""
    folder = vector_directory("tdx")
    quote = (folder / "dcapqvl_tdx_quote").read_bytes()
    collateral = (folder / "dcapqvl_tdx_quote_collateral.json").read_bytes()
    assert accepted_mutations(INTEL_SGX_ROOT_CA, quote, [collateral], 1_752_915_635) == []


def test_of_the_collateral() -> None:
    """What can be changed says nothing: the case of a signature's hexadecimal digits, and ends of lines in PEM."""
    verifier = TdxVerifier((Pki().root_fingerprint,))
    parts = Collateral().parts()
    expected = verifier.verify(Quote().encode(), parts, at=NOW)
    accepted: dict[int, list[str]] = {}
    # The TCB signer's chain ends with a copy of the root, which is not used: the pinned one is.
    parts[2] = parts[2][: parts[2].rindex(b"-----BEGIN")]
    assert verifier.verify(Quote().encode(), parts, at=NOW) == expected
    for number in range(5):
        for position in range(0, len(parts[number]), 3):
            changed = bytearray(parts[number])
            changed[position] ^= 1 << position % 8
            files = [*parts[:number], bytes(changed), *parts[number + 1 :]]
            try:
                claims = verifier.verify(Quote().encode(), files, at=NOW)
            except EvidenceRefusedError:
                continue
            assert claims == expected
            accepted.setdefault(number, []).append(chr(parts[number][position]))
    assert set(accepted.pop(2, [])) <= {"\n"}
    assert {character.lower() for characters in accepted.values() for character in characters} <= set("abcdef")
