from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from tensorguard.evidence.snp.chain import AMD_ROOTS
from tensorguard.evidence.snp.claims import SnpClaims
from tensorguard.evidence.snp.product import Product
from tests.evidence.snp.conftest import Refusal, verify
from tests.support.synthetic_pki import snp
from tests.support.synthetic_pki.snp import AT, START, YEAR, authority, key_usage

DAY = datetime.timedelta(days=1)
ARK = snp.root("Milan")


@pytest.mark.parametrize("signing_key", ["vcek", "vlek"])
@pytest.mark.parametrize("product", list(Product))
def test_a_chain_of_every_product_is_accepted(product: Product, signing_key: str) -> None:
    details = verify(snp.chip(product, signing_key)).details
    assert isinstance(details, SnpClaims)
    assert details.product is product
    assert details.crl_number is None
    assert details.certificate_expires_at == (START + YEAR).timestamp()


def test_amd_roots_are_three() -> None:
    assert sorted(AMD_ROOTS.values()) == sorted(Product)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in AMD_ROOTS)


def test_a_certificate_that_is_missing(refusal: Refusal) -> None:
    chip = snp.chip()
    vcek, ask, ark = chip.endorsements
    assert refusal(chip, endorsements=[]) == "collateral_missing"
    assert refusal(chip, endorsements=[ask, ark]) == "collateral_missing"
    assert refusal(chip, endorsements=[vcek, ark]) == "collateral_missing"
    assert refusal(chip, endorsements=[vcek, ask]) == "collateral_missing"


def test_a_root_that_is_not_trusted(refusal: Refusal) -> None:
    """The names are right, and every signature of it verifies."""
    chip = snp.chip()
    forged_root = authority("ARK-Milan", key="forger")
    forged = snp.chip(ark=forged_root, ask=authority("SEV-Milan", forged_root, path_length=0, key="forger's ask"))
    assert refusal(chip, report=forged.report(), endorsements=forged.endorsements) == "root_not_trusted"
    # nor does the real root beside it help
    assert (
        refusal(chip, report=forged.report(), endorsements=[*forged.endorsements, chip.ark.der]) == "root_not_trusted"
    )


def test_another_certificate_of_the_same_root_key_is_not_trusted(refusal: Refusal) -> None:
    renewed = authority("ARK-Milan", life=YEAR * 2)
    chip = snp.chip(ark=ARK)
    vcek, ask, _ = chip.endorsements
    assert refusal(chip, endorsements=[vcek, ask, renewed.der]) == "root_not_trusted"


def test_signatures_of_others_are_refused(refusal: Refusal) -> None:
    impostor = authority("SEV-Milan", authority("ARK-Milan", key="forger"), path_length=0, key="forger's ask")
    by_impostor = snp.chip(ark=ARK, ask=impostor)
    genuine = snp.chip(ark=ARK)
    vcek, _, ark = by_impostor.endorsements
    assert refusal(genuine, report=by_impostor.report(), endorsements=[vcek, genuine.ask.der, ark]) == "chain"
    assert refusal(genuine, report=by_impostor.report(), endorsements=[vcek, impostor.der, ark]) == "chain"


@pytest.mark.parametrize(
    "changes",
    [
        {"pss": padding.PSS(padding.MGF1(hashes.SHA384()), 32)},
        {"pss": padding.PSS(padding.MGF1(hashes.SHA256()), 48)},
        {"pss": padding.PSS(padding.MGF1(hashes.SHA256()), 32), "digest": hashes.SHA256()},
        {"pss": padding.PKCS1v15()},
    ],
    ids=["salt", "mgf", "sha256", "pkcs1"],
)
def test_other_signature_schemes_are_refused(refusal: Refusal, changes: dict[str, object]) -> None:
    assert refusal(snp.chip(**changes)) == "chain"
    assert refusal(snp.chip(ark=ARK, ask=authority("SEV-Milan", ARK, path_length=0, **changes))) == "chain"


@pytest.mark.parametrize(
    "changes",
    [{"ca": False, "path_length": None}, {"cert_sign": False}],
    ids=["not an authority", "key not for certificates"],
)
def test_an_intermediate_that_may_not_sign_is_refused(refusal: Refusal, changes: dict[str, object]) -> None:
    ask = authority("SEV-Milan", ARK, **{"path_length": 0, **changes})
    assert refusal(snp.chip(ark=ARK, ask=ask)) == "chain"


@pytest.mark.parametrize(
    "changes",
    [{"ca": False}, {"cert_sign": False}, {"path_length": 0}],
    ids=["not an authority", "key not for certificates", "nothing below"],
)
def test_a_root_that_may_not_sign_is_refused(refusal: Refusal, changes: dict[str, object]) -> None:
    assert refusal(snp.chip(ark=authority("ARK-Milan", **changes))) == "chain"


def test_path_length_that_suffices() -> None:
    verify(snp.chip(ark=authority("ARK-Milan", path_length=1)))


def test_an_endorsement_key_signs_nothing_else(refusal: Refusal) -> None:
    assert refusal(snp.chip(more=[(x509.BasicConstraints(True, None), True)])) == "chain"
    assert refusal(snp.chip(more=[(key_usage(key_cert_sign=True), True)])) == "chain"
    verify(snp.chip(more=[(x509.BasicConstraints(False, None), True), (key_usage(digital_signature=True), True)]))


def test_critical_extensions_that_nobody_knows(refusal: Refusal) -> None:
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")
    assert refusal(snp.chip(more=[(extension, True)])) == "chain"
    verify(snp.chip(more=[(extension, False)]))


def test_an_endorsement_key_issues_no_endorsement_key(refusal: Refusal) -> None:
    """The holder of an intermediate of another kind or product cannot make keys of this one."""
    vlek_issuer = authority("SEV-VLEK-Milan", ARK, path_length=0)
    assert refusal(snp.chip(ark=ARK, ask=vlek_issuer)) == "product_mismatch"
    vcek_issuer = authority("SEV-Milan", ARK, path_length=0)
    assert refusal(snp.chip(Product.MILAN, "vlek", ark=ARK, ask=vcek_issuer)) == "product_mismatch"


def test_the_product_of_a_root_is_the_verifiers_choice(refusal: Refusal) -> None:
    """A key that says Genoa below Milan's root."""
    milan = snp.chip(Product.MILAN, ark=ARK)
    chip = snp.chip(Product.GENOA, ark=ARK, ask=milan.ask)
    assert refusal(milan, report=chip.report(), endorsements=chip.endorsements) == "product_mismatch"


@pytest.mark.parametrize("which", ["ark", "ask", "vcek"])
def test_validity_of_each_certificate(refusal: Refusal, which: str) -> None:
    """One of them is valid for a day only, a hundred days after the others begin."""
    short = {"start": START + DAY * 100, "life": DAY}
    ark = authority("ARK-Milan", **(short if which == "ark" else {}))
    ask = authority("SEV-Milan", ark, path_length=0, **(short if which == "ask" else {}))
    chip = snp.chip(ark=ark, ask=ask, **(short if which == "vcek" else {}))
    begin = (START + DAY * 100).timestamp()
    assert refusal(chip, at=begin - 1) == "certificate_not_yet_valid"
    verify(chip, at=begin)
    verify(chip, at=begin + 86400)
    assert refusal(chip, at=begin + 86401) == "certificate_expired"
    assert refusal(chip, at=float("nan")) == "certificate_expired"


@pytest.mark.parametrize("signing_key", ["vcek", "vlek"])
def test_revocation(refusal: Refusal, signing_key: str) -> None:
    chip = snp.chip(Product.MILAN, signing_key)
    clean = chip.ark.revoke(snp.chip(Product.GENOA).certificate, number=9)
    details = verify(chip, endorsements=[clean, *chip.endorsements]).details
    assert isinstance(details, SnpClaims)
    assert details.crl_number == 9
    for revoked in (chip.certificate, chip.ask.certificate, chip.ark.certificate):
        assert refusal(chip, endorsements=[*chip.endorsements, chip.ark.revoke(revoked)]) == "revoked"
        assert refusal(chip, endorsements=[chip.ark.revoke(revoked), clean, *chip.endorsements]) == "revoked"


def test_a_revocation_list_out_of_its_time(refusal: Refusal) -> None:
    chip = snp.chip()
    supplied = [*chip.endorsements, chip.ark.revoke(start=START + DAY, life=DAY)]
    assert refusal(chip, endorsements=supplied, at=AT - 1) == "collateral_not_yet_valid"
    verify(chip, endorsements=supplied, at=AT)
    verify(chip, endorsements=supplied, at=AT + 86399)
    assert refusal(chip, endorsements=supplied, at=AT + 86400) == "collateral_expired"


def test_a_revocation_list_that_the_root_did_not_sign(refusal: Refusal) -> None:
    chip = snp.chip()
    forged = chip.ark.revoke(signer=snp.rsa_key("forger"))
    assert refusal(chip, endorsements=[*chip.endorsements, forged]) == "signature"


def test_a_root_that_may_not_sign_lists(refusal: Refusal) -> None:
    chip = snp.chip(ark=authority("ARK-Milan", crl_sign=False))
    assert refusal(chip, endorsements=[*chip.endorsements, chip.ark.revoke()]) == "signature"


def test_part_of_a_revocation_list_is_refused(refusal: Refusal) -> None:
    chip = snp.chip()
    delta = chip.ark.revoke(extensions=((x509.DeltaCRLIndicator(1), True),))
    assert refusal(chip, endorsements=[*chip.endorsements, delta]) == "malformed"


def test_certificates_and_lists_of_others_do_no_harm() -> None:
    """As in a folder that has everything; the keys of other chips of the product are there too."""
    chip, other, older = snp.chip(), snp.chip(Product.TURIN), snp.chip(tcb={"microcode": 100})
    neighbour = snp.chip(amd={"4": b"n" * 64})
    everything = [
        *neighbour.endorsements,
        *older.endorsements,
        *other.endorsements,
        other.ark.revoke(),
        *chip.endorsements,
        *snp.chip(Product.MILAN, "vlek").endorsements,
    ]
    for supplied in (everything, everything[::-1]):
        details = verify(chip, endorsements=supplied).details
        assert isinstance(details, SnpClaims)
        assert details.crl_number is None
