from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.snp.claims import SigningKey, SnpClaims
from tensorguard.evidence.snp.product import Product, TcbVersion
from tensorguard.evidence.snp.verifier import SnpVerifier
from tests.evidence.snp.conftest import Refusal, verify
from tests.support.synthetic_pki import snp


@pytest.mark.parametrize("signing_key", ["vcek", "vlek"])
@pytest.mark.parametrize("product", list(Product))
@pytest.mark.parametrize("version", [2, 3, 5])
def test_every_version_of_every_product(version: int, product: Product, signing_key: str) -> None:
    chip = snp.chip(product, signing_key)
    claims = verify(chip, report=chip.report(version=version))
    details = claims.details
    assert claims.kind is EvidenceKind.SNP
    assert claims.issued_at is None and claims.role is None and not claims.debug
    assert claims.report_data == b"r" * 64
    assert isinstance(details, SnpClaims)
    assert (details.report_version, details.product) == (version, product)
    assert details.signing_key is SigningKey(signing_key)
    assert details.csp_id == (snp.CSP_ID if signing_key == "vlek" else None)
    assert details.chip_id == (snp.HWID[product].ljust(64, b"\0").hex() if signing_key == "vcek" else None)
    fmc = 1 if product is Product.TURIN else None
    assert details.reported_tcb == TcbVersion(bootloader=4, tee=1, snp=24, microcode=219, fmc=fmc)


def test_what_the_guest_is() -> None:
    chip = snp.chip()
    claims = verify(
        chip,
        report=chip.report(
            measurement=b"\x01" * 48,
            host_data=b"\x02" * 32,
            id_key_digest=b"\x03" * 48,
            author_key_digest=b"\x04" * 48,
            key_bits=1,
        ),
    )
    assert claims.measurements == {
        "measurement": "01" * 48,
        "host_data": "02" * 32,
        "id_key_digest": "03" * 48,
        "author_key_digest": "04" * 48,
    }


def test_debug_is_a_claim() -> None:
    chip = snp.chip()
    assert verify(chip, report=chip.report(policy=0x30000 | 1 << 19)).debug


def test_versions_that_differ() -> None:
    chip = snp.chip()
    versions = {
        f"{kind}_tcb": snp.tcb_bytes(Product.MILAN, bootloader=5, tee=2, snp=25, microcode=220 + i)
        for i, kind in enumerate(("current", "committed", "launch"))
    }
    details = verify(chip, report=chip.report(**versions)).details
    assert isinstance(details, SnpClaims)
    found = (details.reported_tcb, details.current_tcb, details.committed_tcb, details.launch_tcb)
    assert [tcb.microcode for tcb in found] == [219, 220, 221, 222]


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode", "fmc"])
def test_the_certificate_is_for_the_reported_tcb_only(refusal: Refusal, part: str) -> None:
    chip = snp.chip(Product.TURIN)
    for change in (-1, 1):
        reported = snp.tcb_bytes(Product.TURIN, **{**chip.tcb, part: chip.tcb[part] + change})
        assert refusal(chip, report=chip.report(reported_tcb=reported)) == "tcb_mismatch"


def test_reserved_versions_are_compared_too(refusal: Refusal) -> None:
    assert refusal(snp.chip(amd={"3.5": snp.der_integer(1)})) == "tcb_mismatch"


@pytest.mark.parametrize("product", list(Product))
def test_the_certificate_is_of_this_chip(refusal: Refusal, product: Product) -> None:
    chip = snp.chip(product)
    assert refusal(chip, report=chip.report(chip_id=b"x" * 64)) == "chip_id_mismatch"
    assert refusal(chip, report=chip.report(chip_id=b"")) == "chip_id_mismatch"  # masked


def test_the_rest_of_a_turin_chip_id_is_zero(refusal: Refusal) -> None:
    chip = snp.chip(Product.TURIN)
    assert refusal(chip, report=chip.report(chip_id=snp.HWID[Product.TURIN] + b"\1")) == "chip_id_mismatch"


def test_the_processor_is_of_the_certificates_product(refusal: Refusal) -> None:
    chip = snp.chip(Product.MILAN)
    assert refusal(chip, report=chip.report(cpuid=snp.CPUID[Product.GENOA])) == "product_mismatch"
    assert refusal(chip, report=chip.report(cpuid=(0x19, 0x60, 0))) == "product_mismatch"


def test_the_report_is_signed_by_the_certified_key(refusal: Refusal) -> None:
    chip = snp.chip()
    unsigned = chip.report()[:0x2A0]
    assert refusal(chip, report=snp.sign(unsigned, snp.ec_key("another"))) == "signature"
    assert refusal(chip, report=unsigned + bytes(512)) == "signature"
    assert refusal(chip, report=unsigned + b"\xff" * 144 + bytes(368)) == "signature"
    r, s = chip.report()[0x2A0:0x2E8], chip.report()[0x2E8:0x330]
    assert refusal(chip, report=unsigned + s + r + bytes(368)) == "signature"


def test_a_signature_over_another_report(refusal: Refusal) -> None:
    chip = snp.chip()
    one, two = chip.report(report_data=b"1" * 64), chip.report(report_data=b"2" * 64)
    assert refusal(chip, report=one[:0x2A0] + two[0x2A0:]) == "signature"


def test_the_key_is_of_the_kind_the_report_names(refusal: Refusal) -> None:
    vcek, vlek = snp.chip(), snp.chip(Product.MILAN, "vlek")
    assert refusal(vcek, report=vcek.report(key_bits=1 << 2)) == "collateral_missing"
    assert refusal(vlek, report=vlek.report(key_bits=0)) == "collateral_missing"


def test_amd_is_trusted_unless_told_otherwise(refusal: Refusal) -> None:
    chip = snp.chip()
    with pytest.raises(EvidenceRefusedError) as refused:
        SnpVerifier().verify(chip.report(), chip.endorsements, at=snp.AT)
    assert refused.value.detail == "root_not_trusted"


def test_a_folder_has_the_keys_of_several_providers() -> None:
    """Their VLEKs name no chip, and two may be of the same firmware version."""
    other = snp.chip(Product.MILAN, "vlek", key=snp.ec_key("another provider"), amd={"5": snp.der_text("CN=other")})
    chip = snp.chip(Product.MILAN, "vlek", ask=other.ask)
    for supplied in ([*other.endorsements, *chip.endorsements], [*chip.endorsements, *other.endorsements]):
        details = verify(chip, endorsements=supplied).details
        assert isinstance(details, SnpClaims)
        assert details.csp_id == snp.CSP_ID


def test_a_folder_has_two_certificates_of_one_key() -> None:
    old = snp.chip(life=datetime.timedelta(hours=1))
    new = snp.chip(ask=old.ask)
    for supplied in ([*old.endorsements, *new.endorsements], [*new.endorsements, *old.endorsements]):
        verify(new, endorsements=supplied)


def test_the_second_form_of_a_signature_says_the_same() -> None:
    """What nobody can prevent: it is why nothing takes the digest of a report for its identity."""
    chip = snp.chip()
    report = chip.report()
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    other = (order - int.from_bytes(report[0x2E8:0x330], "little")).to_bytes(72, "little")
    assert verify(chip, report=report[:0x2E8] + other + report[0x330:]) == verify(chip, report=report)


EDITED = snp.chip()
PARTS = (EDITED.report(), *EDITED.endorsements, EDITED.ark.revoke())
WHOLE = verify(EDITED, report=PARTS[0], endorsements=PARTS[1:4])


@settings(deadline=None)
@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=8)), min_size=1, max_size=4))
def test_edited_parts_are_refused_or_say_the_same(part: int, edits: list[tuple[int, bytes]]) -> None:
    """Nothing but EvidenceRefusedError is raised; a list that became another root's is not counted."""
    parts = list(PARTS)
    for position, content in edits:
        parts[part] = parts[part][:position] + content + parts[part][position + len(content) :]
    try:
        claims = verify(EDITED, report=parts[0], endorsements=parts[1:])
    except EvidenceRefusedError:
        return
    assert isinstance(claims.details, SnpClaims)
    assert replace(claims, details=replace(claims.details, crl_number=None)) == WHOLE
