"""No byte of an accepted report, nor of the certificates it is accepted with, can be changed."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp.claims import SnpClaims
from tensorguard.evidence.snp.product import Product
from tensorguard.evidence.snp.verifier import SnpVerifier
from tests.support.attestation_vectors import vector_directory
from tests.support.synthetic_pki import snp

Verify = Callable[[list[bytes]], object]


def synthetic() -> tuple[Verify, list[bytes]]:
    chip = snp.chip(Product.TURIN, "vlek")
    verifier = SnpVerifier(chip.roots)
    return lambda parts: verifier.verify(parts[0], parts[1:], at=snp.AT), [chip.report(), *chip.endorsements]


def real(report: str, vek: str, chain: str) -> tuple[Verify, list[bytes]]:
    folder = vector_directory("snp")
    entries = json.loads((folder / "expected.json").read_text())
    [time] = [entry["verify_at"] for entry in entries if entry["report"] == report]
    at = datetime.datetime.fromisoformat(time).timestamp()
    files = [folder / report, folder / vek, folder / chain]
    certificates = [item for file in files[1:] for item in load(file.read_bytes())]
    return lambda parts: SnpVerifier().verify(parts[0], parts[1:], at=at), [files[0].read_bytes(), *certificates]


def load(content: bytes) -> list[bytes]:
    if not content.startswith(b"-----"):
        return [content]
    return [item.public_bytes(Encoding.DER) for item in x509.load_pem_x509_certificates(content)]


def accepted_changes(verify: Verify, parts: list[bytes], index: int) -> list[int]:
    """Offsets in one part at which one changed bit leaves the evidence accepted; another bit at each offset."""
    verify(parts)
    found = []
    for offset in range(len(parts[index])):
        changed = bytearray(parts[index])
        changed[offset] ^= 1 << offset % 8
        try:
            verify([*parts[:index], bytes(changed), *parts[index + 1 :]])
        except EvidenceRefusedError:
            continue
        found.append(offset)
    return found


@pytest.mark.parametrize("part", range(4), ids=["report", "vek", "ask", "ark"])
def test_synthetic(part: int) -> None:
    verify, parts = synthetic()
    assert accepted_changes(verify, parts, part) == []


@pytest.mark.parametrize("part", range(2), ids=["report", "vek"])
@pytest.mark.parametrize(
    "names",
    [
        ("trustee_test-report.bin", "trustee_test-vcek.der", "ask_ark_milan.pem"),
        ("ms_turin_attestation_report.bin", "ms_turin_vcek.pem", "ask_ark_turin_vcek.pem"),
    ],
    ids=["milan", "turin"],
)
def test_real(names: tuple[str, str, str], part: int) -> None:
    verify, parts = real(*names)
    assert accepted_changes(verify, parts, part) == []


def test_revocation_list() -> None:
    """A changed list is refused or, where it is now somebody else's, not counted: a policy can require one."""
    chip = snp.chip()
    verifier, report, crl = SnpVerifier(chip.roots), chip.report(), chip.ark.revoke(number=7)
    for offset in range(len(crl)):
        changed = bytearray(crl)
        changed[offset] ^= 1 << offset % 8
        try:
            details = verifier.verify(report, [*chip.endorsements, bytes(changed)], at=snp.AT).details
        except EvidenceRefusedError:
            continue
        assert isinstance(details, SnpClaims)
        assert details.crl_number is None, offset


def test_unused_bits_of_a_signature() -> None:
    """Their count is not signed, and 0 in DER. cryptography takes 1 to 7 where that many bits of the end are zero."""
    chips = (snp.chip() for _ in range(100))
    chip = next(item for item in chips if not item.certificate.signature[-1] & 1)
    vcek, *others = chip.endorsements
    count = len(vcek) - len(chip.certificate.signature) - 1
    assert vcek[count] == 0
    changed = vcek[:count] + b"\1" + vcek[count + 1 :]
    assert x509.load_der_x509_certificate(changed).signature == chip.certificate.signature
    with pytest.raises(EvidenceRefusedError) as refused:
        SnpVerifier(chip.roots).verify(chip.report(), [changed, *others], at=snp.AT)
    assert refused.value.detail == "chain"
