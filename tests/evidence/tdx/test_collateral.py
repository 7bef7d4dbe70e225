"""Files in, parts out; and what is refused before anything in it counts."""

from __future__ import annotations

import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.tdx.collateral import MAX_FILE_BYTES, MAX_FILES, sort_endorsements
from tests.support.synthetic_pki.tdx import FMSPC, Collateral, Pki, pem

PKI = Pki()
COLLATERAL = Collateral()
PARTS = COLLATERAL.parts()


def reason(*files: bytes) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        sort_endorsements(files)
    return refused.value.detail


def test_parts_and_bundle_are_the_same() -> None:
    parts, bundle = sort_endorsements(tuple(PARTS)), sort_endorsements((COLLATERAL.bundle(),))
    assert parts.tcb_infos == bundle.tcb_infos
    assert parts.qe_identities == bundle.qe_identities
    assert parts.revocation_lists == bundle.revocation_lists
    assert set(parts.certificates) < set(bundle.certificates)
    [info] = parts.tcb_infos
    assert (info.text, info.fmspc, info.evaluation) == (COLLATERAL.tcb_info(), FMSPC.hex(), 17)


def test_der_and_pem() -> None:
    der = PKI.root.public_bytes(serialization.Encoding.DER)
    text = x509.load_der_x509_crl(PKI.root_crl()).public_bytes(serialization.Encoding.PEM)
    found = sort_endorsements((der, pem(PKI.tcb_signer), text))
    assert found.certificates == [PKI.root, PKI.tcb_signer]
    assert [item.issuer for item in found.revocation_lists] == [PKI.root.subject]


@pytest.mark.parametrize("data", [b"", b"hello", b"\x01\x02", b"-----BEGIN PRIVATE KEY-----", b"{}", b'{"tcb_info":1}'])
def test_files_of_no_use(data: bytes) -> None:
    assert reason(data) == "endorsement_unused"


@pytest.mark.parametrize(
    "data",
    [
        b"0\x82",
        b"{",
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"\xff{",
        PARTS[0][:-1],
        PARTS[0].replace(b'"signature":"', b'"signature":"x'),
        PARTS[0].replace(b'"issueDate"', b'"issueDat"'),
        b'{"tcbInfo":[],"signature":""}',
        b'{"tcbInfo":{"id":1},"signature":""}',
        PARTS[3][:-1],
        pem(PKI.root)[:-40] + b"-----END CERTIFICATE-----\n",
        json.dumps({**json.loads(COLLATERAL.bundle()), "pck_crl": "zz"}).encode(),
        json.dumps({**json.loads(COLLATERAL.bundle()), "tcb_info": 5}).encode(),
    ],
)
def test_files_that_cannot_be_read(data: bytes) -> None:
    assert reason(data) in ("malformed", "endorsement_unused")


def test_bounds() -> None:
    assert sort_endorsements((PARTS[2].ljust(MAX_FILE_BYTES),)).certificates
    assert reason(PARTS[2].ljust(MAX_FILE_BYTES + 1)) == "malformed"
    assert reason(*[PARTS[2]] * (MAX_FILES + 1)) == "malformed"
    sort_endorsements((PARTS[2],) * MAX_FILES)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from([b"", b"{", b"0", b'{"tcbInfo":', b"-----BEGIN CERTIFICATE-----\n"]))
def test_any_bytes_are_sorted_or_refused(data: bytes, start: bytes) -> None:
    try:
        sort_endorsements((start + data,))
    except EvidenceRefusedError as refused:
        assert refused.detail in ("malformed", "endorsement_unused")
