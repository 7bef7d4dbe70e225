from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp import endorsements
from tensorguard.evidence.snp.endorsements import MAX_FILE_BYTES, parse_endorsements
from tests.support.attestation_vectors import vector_directory
from tests.support.synthetic_pki import snp
from tests.support.synthetic_pki.snp import DER, PEM

VCEK = "63da758d-e664-4564-adc5-f4b93be8accd"
VLEK = "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
ASK = "4ab7b379-bbac-4fe4-a02f-05aef327c782"
ARK = "c0b406a4-a803-4952-9743-3fb6014cd0ae"
CRL = "92f81bc3-5811-4d3d-97ff-d19f88dc67ea"
OTHER = "ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"

chip = snp.chip()
vcek, ask, ark = chip.endorsements
crl = chip.ark.revoke()


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(PEM)


def pem_list(der: bytes) -> bytes:
    return x509.load_der_x509_crl(der).public_bytes(PEM)


def refusal(*files: bytes) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        parse_endorsements(files)
    return refused.value.detail


@pytest.mark.parametrize(
    "files",
    [
        [vcek, ask, ark, crl],
        [crl, ark, ask, vcek],
        [pem(vcek), pem(ask) + pem(ark), pem_list(crl)],
        [b"\n" + pem_list(crl) + b"text\r\n" + pem(ark).replace(b"\n", b"\r\n") + pem(ask) + pem(vcek)],
        [snp.certificate_table([(VCEK, vcek), (ASK, ask), (ARK, ark), (CRL, crl)])],
        [snp.certificate_table([(OTHER, b"12345678"), (ARK, pem(ark)), (VLEK, vcek), (ASK, pem(ask))]), crl],
        [vcek, ask, ark, crl, vcek, pem(ark)],
    ],
)
def test_every_format_and_order_gives_the_same(files: list[bytes]) -> None:
    found = parse_endorsements(files)
    assert sorted(item.public_bytes(DER) for item in found.certificates) == sorted([vcek, ask, ark])
    assert [item.public_bytes(DER) for item in found.revocation_lists] == [crl]


def test_nothing_supplied_is_nothing() -> None:
    assert parse_endorsements([]).certificates == ()


KEY_BLOCK = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"{}",
        bytes(range(1, 24)),
        snp.certificate_table([(OTHER, b"")])[:24],  # does not end
    ],
)
def test_what_is_of_no_use_is_refused(content: bytes) -> None:
    assert refusal(content) == "endorsement_unused"
    assert refusal(vcek, content) == "endorsement_unused"


@pytest.mark.parametrize(
    "content",
    [
        b"0",
        vcek[:-1],
        vcek + b"\0",
        b"\x30\x03\x02\x01\x00",
        pem(vcek)[:-20],
        pem(vcek).replace(b"M", b"!", 1),
        pem(vcek) + KEY_BLOCK,
        KEY_BLOCK,
        b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n" + b"A" * 80,
        snp.certificate_table([(VCEK, vcek)])[:-1],
        snp.certificate_table([(VCEK, vcek + b"\0")])[:-1],  # points outside by one byte, after a whole certificate
        snp.certificate_table([(VCEK, vcek[:-1])]),
        snp.certificate_table([(VCEK, b"")]),
        snp.certificate_table([(VCEK, KEY_BLOCK)]),
        snp.certificate_table([(VCEK, snp.certificate_table([(VCEK, vcek)]))]),  # a table in a table
        snp.certificate_table([(OTHER, b"")] * 65),
    ],
)
def test_what_is_damaged_is_refused(content: bytes) -> None:
    assert refusal(content) == "malformed"
    assert refusal(vcek, content) == "malformed"


def test_size_is_bounded() -> None:
    assert refusal(pem(vcek).rjust(MAX_FILE_BYTES + 1, b"\n")) == "malformed"
    assert parse_endorsements([pem(vcek).rjust(MAX_FILE_BYTES, b"\n")]).certificates


def test_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endorsements, "MAX_OBJECTS", 3)
    assert len(parse_endorsements([vcek, ask, ark, ark]).certificates) == 3
    assert refusal(vcek, ask, ark, crl) == "malformed"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(content: bytes) -> None:
    try:
        parse_endorsements([content])
    except EvidenceRefusedError as refused:
        assert refused.detail in {"endorsement_unused", "malformed"}


@given(st.integers(0, len(vcek) - 1), st.integers(1, 255))
def test_damaged_tables_raise_nothing_else(position: int, change: int) -> None:
    table = bytearray(snp.certificate_table([(VCEK, vcek), (ASK, ask)]))
    table[position] ^= change
    try:
        parse_endorsements([bytes(table)])
    except EvidenceRefusedError as refused:
        assert refused.detail in {"endorsement_unused", "malformed"}


def test_the_serial_number_0_of_a_real_certificate_is_no_reason_to_warn() -> None:
    path = vector_directory("snp") / "virtee_vcek_milan.der"
    code = (
        "import sys\nfrom tensorguard.evidence.snp.endorsements import parse_endorsements\n"
        "[key] = parse_endorsements([open(sys.argv[1], 'rb').read()]).certificates\nprint(key.serial_number)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
