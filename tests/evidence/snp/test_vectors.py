"""Real reports: each gives what is expected of it at its time, and what must be refused is, for the right reason."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import evidence_appraisal
from tensorguard.evidence.claims import Claims, Role
from tensorguard.evidence.policy import Policy, parse_policy
from tensorguard.evidence.snp.chain import AMD_ROOTS, verify_chain
from tensorguard.evidence.snp.claims import SigningKey, SnpClaims
from tensorguard.evidence.snp.endorsement_key import is_endorsement_key, parse_endorsement_key
from tensorguard.evidence.snp.endorsements import parse_endorsements
from tensorguard.evidence.snp.product import Product, TcbVersion
from tensorguard.evidence.snp.verifier import SnpVerifier
from tests.support.attestation_vectors import vector_directory

REPORTS = (
    "gosev_attestation.bin",
    "virtee_report_milan.hex",
    "trustee_test-report.bin",
    "trustee_test-vlek-report.bin",
    "az_genoa_snp_report.bin",
    "ms_milan_attestation_report.bin",
    "ms_turin_attestation_report.bin",
)


def expected(report: str) -> dict[str, Any]:
    entries = json.loads((vector_directory("snp") / "expected.json").read_text())
    assert sorted(entry["report"] for entry in entries) == sorted(REPORTS)
    return next(entry for entry in entries if entry["report"] == report)


def read(name: str) -> bytes:
    content = Path(vector_directory("snp") / name).read_bytes()
    return bytes.fromhex(content.decode()) if name.endswith(".hex") else content


def verify(entry: dict[str, Any], *, vek: str = "", chain: str = "", at: str = "") -> Claims:
    time = datetime.datetime.fromisoformat(at or entry["verify_at"]).timestamp()
    supplied = [read(chain or entry["chain"]), read(vek or entry["vek"])]
    return SnpVerifier().verify(read(entry["report"]), supplied, at=time)


def refusal(entry: dict[str, Any], **changes: str) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        verify(entry, **changes)
    return refused.value.detail


@pytest.mark.parametrize("report", REPORTS)
def test_every_report_says_what_is_expected(report: str) -> None:
    entry = expected(report)
    claims = verify(entry)
    details = claims.details
    assert isinstance(details, SnpClaims)
    assert claims.debug == entry["debug"]
    assert claims.report_data.hex() == entry["report_data"]
    for register in ("measurement", "host_data", "id_key_digest"):
        assert claims.measurements[register] == entry[register]
    assert details.report_version == entry["version"]
    assert details.product.label == entry["product"].partition("-")[0]
    assert AMD_ROOTS[entry["ark_sha256"]] is details.product
    assert details.signing_key is SigningKey(entry["signing_key"].lower())
    assert details.csp_id == entry["csp_id"]
    assert details.chip_id == (entry["chip_id"] if int(entry["chip_id"], 16) else None)
    assert (details.vmpl, details.guest_svn) == (entry["vmpl"], entry["guest_svn"])
    assert details.guest_policy.migration_agent == entry["migrate_ma"]
    policy = int(entry["guest_policy"], 16)
    assert (details.guest_policy.abi_minor, details.guest_policy.abi_major) == (policy & 0xFF, policy >> 8 & 0xFF)
    assert details.platform.smt == bool(int(entry["platform_info"], 16) & 1)
    assert details.platform.alias_check == bool(int(entry["platform_info"], 16) & 32)
    tcb = entry["reported_tcb"]
    assert details.reported_tcb == TcbVersion(
        bootloader=tcb["bl"], tee=tcb["tee"], snp=tcb["snp"], microcode=tcb["ucode"], fmc=tcb.get("fmc")
    )
    for version, raw in (
        (details.committed_tcb, entry["committed_tcb"]),
        (details.launch_tcb, entry["launch_tcb"]),
    ):
        assert version == TcbVersion.from_bytes(bytes.fromhex(raw), details.product)
    assert details.certificate_expires_at == datetime.datetime.fromisoformat(entry["vek_valid"][1]).timestamp()


@pytest.mark.parametrize("report", REPORTS)
def test_every_certificate_ends(report: str) -> None:
    entry = expected(report)
    start, end = (datetime.datetime.fromisoformat(time) for time in entry["vek_valid"])
    second = datetime.timedelta(seconds=1)
    verify(entry, at=start.isoformat())
    verify(entry, at=end.isoformat())
    assert refusal(entry, at=(start - second).isoformat()) == "certificate_not_yet_valid"
    assert refusal(entry, at=(end + second).isoformat()) == "certificate_expired"


def test_the_vlek_has_expired_by_now() -> None:
    assert refusal(expected("trustee_test-vlek-report.bin"), at="2026-11-23T00:00:00+00:00") == "certificate_expired"


@pytest.mark.parametrize("forged", ["trustee_test-vcek-invalid-legacy.der", "trustee_test-vcek-invalid-new.der"])
def test_forged_vceks(forged: str) -> None:
    entry = expected("trustee_test-report.bin")
    assert refusal(entry, vek=forged, at="2024-01-01T00:00:00+00:00") == "chain"


def test_the_vcek_of_another_chip() -> None:
    entry = expected("trustee_test-report.bin")
    assert refusal(entry, vek="virtee_vcek_milan.der", at="2024-01-01T00:00:00+00:00") == "chip_id_mismatch"


@pytest.mark.parametrize(
    ("report", "chain"),
    [
        ("virtee_report_milan.hex", "ask_ark_genoa.pem"),
        ("virtee_report_milan.hex", "ask_ark_milan_vlek.pem"),
        ("trustee_test-vlek-report.bin", "ask_ark_milan.pem"),
        ("ms_turin_attestation_report.bin", "ask_ark_turin_vlek.pem"),
    ],
)
def test_the_chain_of_another_key(report: str, chain: str) -> None:
    assert refusal(expected(report), chain=chain) == "collateral_missing"


def test_a_vcek_does_not_vouch_for_what_a_vlek_signed() -> None:
    entry = expected("trustee_test-vlek-report.bin")
    assert refusal(entry, vek="ms_milan_vcek.pem", chain="ask_ark_milan.pem") == "collateral_missing"


@pytest.mark.parametrize(
    "chain",
    [
        "ask_ark_milan",
        "ask_ark_milan_vlek",
        "ask_ark_genoa",
        "ask_ark_genoa_vlek",
        "ask_ark_turin_vcek",
        "ask_ark_turin_vlek",
    ],
)
def test_all_pinned_roots_are_amds(chain: str) -> None:
    """The roots of both kinds of chain of each product, whether there is a report for it or not."""
    _, root = x509.load_pem_x509_certificates(read(f"{chain}.pem"))
    assert AMD_ROOTS[hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()].value in chain


def test_a_turin_vcek_without_a_report() -> None:
    """Its chain is all that there is to verify."""
    supplied = parse_endorsements([read("ask_ark_turin_vcek.pem"), read("virtee_vcek_turin.der")])
    [key] = [parse_endorsement_key(item) for item in supplied.certificates if is_endorsement_key(item)]
    assert (key.product, key.tcb.hex()) == (Product.TURIN, "0000000000000009")
    at = datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone.utc).timestamp()
    assert verify_chain(key, supplied, AMD_ROOTS, at=at).product is Product.TURIN


def documented_policy() -> Policy:
    text = (Path(__file__).parents[3] / "docs" / "attestation.md").read_text()
    found = re.search(r"```yaml\n(version: 1\nid: snp-example.*?)```", text, re.DOTALL)
    assert found is not None
    return parse_policy(found[1])


def decision(entry: dict[str, Any], policy: Policy) -> str:
    claims = verify(entry)
    try:
        evidence_appraisal(policy, exchange=[], measurements=policy.roles[Role.COPROCESSOR].measurements).verify(claims)
    except EvidenceRefusedError as refused:
        return refused.detail
    return "accepted"


def test_the_documented_policy_accepts_the_report_it_is_for() -> None:
    assert decision(expected("virtee_report_milan.hex"), documented_policy()) == "accepted"


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("gosev_attestation.bin", "debug_enabled"),
        ("trustee_test-report.bin", "measurement_not_allowed"),
        ("trustee_test-vlek-report.bin", "signing_key_not_allowed"),
        ("az_genoa_snp_report.bin", "product_not_allowed"),
        ("ms_milan_attestation_report.bin", "measurement_not_allowed"),
        ("ms_turin_attestation_report.bin", "product_not_allowed"),
    ],
)
def test_the_documented_policy_refuses_the_others(report: str, reason: str) -> None:
    assert decision(expected(report), documented_policy()) == reason
