from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.endorsement_key import is_endorsement_key, parse_endorsement_key
from tensorguard.evidence.snp.product import Product
from tests.support.synthetic_pki import snp


def refusal(chip: snp.Chip) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        parse_endorsement_key(chip.certificate)
    return refused.value.detail


@pytest.mark.parametrize("product", list(Product))
def test_vcek(product: Product) -> None:
    key = parse_endorsement_key(snp.chip(product).certificate)
    assert (key.product, key.signing_key, key.csp_id) == (product, SigningKey.VCEK, None)
    assert key.chip_id == snp.HWID[product].ljust(64, b"\0")


@pytest.mark.parametrize("product", list(Product))
def test_a_chip_id_may_be_an_octet_string(product: Product) -> None:
    hwid = snp.HWID[product]
    key = parse_endorsement_key(snp.chip(product, amd={"4": bytes([4, len(hwid)]) + hwid}).certificate)
    assert key.chip_id == hwid.ljust(64, b"\0")


@pytest.mark.parametrize("product", list(Product))
def test_vlek(product: Product) -> None:
    key = parse_endorsement_key(snp.chip(product, "vlek").certificate)
    assert (key.product, key.signing_key, key.csp_id) == (product, SigningKey.VLEK, snp.CSP_ID)
    assert key.chip_id is None


def test_firmware_versions_stand_as_in_the_products_reports() -> None:
    tcb = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 255}
    assert parse_endorsement_key(snp.chip(tcb=tcb).certificate).tcb == bytes([1, 2, 0, 0, 0, 0, 3, 255])
    turin = snp.chip(Product.TURIN, tcb={**tcb, "fmc": 9})
    assert parse_endorsement_key(turin.certificate).tcb == bytes([9, 1, 2, 3, 0, 0, 0, 255])
    reserved = snp.chip(amd={f"3.{spl}": snp.der_integer(spl) for spl in (4, 5, 6, 7)})
    assert parse_endorsement_key(reserved.certificate).tcb[2:6] == bytes([4, 5, 6, 7])


def test_which_certificates_are_of_endorsement_keys() -> None:
    chip = snp.chip()
    assert is_endorsement_key(chip.certificate)
    assert not is_endorsement_key(chip.ask.certificate)


@pytest.mark.parametrize(
    "amd",
    [
        {"1": None},
        {"1": snp.der_integer(2)},
        {"1": b"\x02\x01"},
        {"2": snp.der_text("Rome-B0")},
        {"2": snp.der_text("")},
        {"2": b"Milan"},
        {"3.1": None},
        {"3.3": None},
        {"3.8": None},
        {"3.5": None},
        {"3.8": snp.der_integer(256)},
        {"3.8": b"\x02\x01\xff"},
        {"3.8": b"\x04\x01\x01"},
        {"3.8": b"\x02\x01\x01\x00"},
        {"4": None},
        {"4": b"4" * 63},
        {"4": b"4" * 8},
        {"4": b"\x04\x3f" + b"4" * 63},
        {"4": b"\x04\x08" + b"4" * 8},
        {"5": snp.der_text(snp.CSP_ID)},
    ],
    ids=str,
)
def test_other_extensions_are_refused(amd: dict[str, bytes | None]) -> None:
    assert refusal(snp.chip(amd=amd)) == "malformed"


def test_turin_has_its_own() -> None:
    assert refusal(snp.chip(Product.TURIN, amd={"3.9": None})) == "malformed"
    assert refusal(snp.chip(Product.TURIN, amd={"4": b"4" * 64})) == "malformed"


def test_other_keys_are_refused() -> None:
    assert refusal(snp.chip(key=snp.ec_key("p256", ec.SECP256R1))) == "malformed"
    assert refusal(snp.chip(key=snp.rsa_key("not ec"))) == "malformed"
