"""Real documents, at the times and with the results that the vectors' expected.json says."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tensorguard.cli.main import run
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.nitro.verifier import AWS_NITRO_ROOT_G1_SHA256, NitroVerifier
from tensorguard.evidence.offline import OfflineRequest, OfflineResult, appraise_offline
from tensorguard.evidence.policy import parse_policy
from tests.evidence.nitro.test_checks import nitro_policy
from tests.support.attestation_vectors import vector_directory

PRODUCTION = "evervault_valid-attestation-doc-bytes"
DEBUG = "evervault_debug-mode-attestation-doc-bytes"


def expected(name: str) -> dict[str, Any]:
    document = json.loads((vector_directory("nitro") / "expected.json").read_text())
    assert document["root_sha256"] == AWS_NITRO_ROOT_G1_SHA256
    entry: dict[str, Any] = next(item for item in document["docs"] if item["file"] == name)
    return entry


def evidence(name: str) -> bytes:
    return (vector_directory("nitro") / name).read_bytes()


def optional(value: str | None) -> bytes | None:
    return None if value is None else bytes.fromhex(value)


@pytest.mark.parametrize("name", [PRODUCTION, DEBUG])
def test_claims(name: str) -> None:
    want = expected(name)
    start, end = (datetime.fromisoformat(text).timestamp() for text in want["valid"])
    for at in (start, want["timestamp_ms"] / 1000, end):
        claims = NitroVerifier().verify(evidence(name), at=at)
    registers = {f"pcr{index}": value for index, value in want["pcrs"].items()}
    registers |= {f"pcr{index}": "00" * 48 for index in want["zero_pcrs"]}
    assert claims.measurements == registers
    assert claims.debug is want["debug_mode"]
    assert claims.issued_at == want["timestamp_ms"] // 1000
    assert claims.nonce == (optional(want["nonce"]) or b"")
    assert claims.report_data == (optional(want["user_data"]) or b"")
    assert isinstance(claims.details, NitroClaims)
    assert (claims.details.module_id, claims.details.certificate_expires_at) == (want["module_id"], end)
    assert claims.details.public_key == optional(want["public_key"])


@pytest.mark.parametrize("name", [PRODUCTION, DEBUG])
@pytest.mark.parametrize(
    ("edge", "seconds", "code"), [(0, -1, "certificate_not_yet_valid"), (1, 1, "certificate_expired")]
)
def test_outside_the_window(name: str, edge: int, seconds: int, code: str) -> None:
    at = datetime.fromisoformat(expected(name)["valid"][edge]).timestamp() + seconds
    with pytest.raises(EvidenceRefusedError) as refused:
        NitroVerifier().verify(evidence(name), at=at)
    assert refused.value.detail == code


def test_no_byte_can_be_changed() -> None:
    good, at = evidence(PRODUCTION), expected(PRODUCTION)["timestamp_ms"] / 1000
    for position in range(len(good)):
        mutated = bytearray(good)
        mutated[position] ^= 1 << position % 8
        with pytest.raises(EvidenceRefusedError) as refused:
            NitroVerifier().verify(bytes(mutated), at=at)
        assert refused.value.detail in ("signature", "malformed", "algorithm")


def appraise(name: str, *, at: float = 0, nonce: bytes | None = None, **changes: Any) -> OfflineResult:
    want = expected(name)
    registers = {f"pcr{index}": want["pcrs"].get(str(index), "00" * 48) for index in (0, 1, 2, 3, 4)}
    policy = nitro_policy(registers, **{"required_claims": ["nonce"], **changes})
    moment = at or want["timestamp_ms"] / 1000
    request = OfflineRequest(EvidenceKind.NITRO, evidence(name), policy, moment, nonce=nonce)
    return appraise_offline(request, NitroVerifier())


def test_a_policy_accepts_the_production_enclave() -> None:
    nonce = bytes.fromhex(expected(PRODUCTION)["nonce"])
    assert appraise(PRODUCTION, nonce=nonce).accepted
    assert appraise(PRODUCTION, instances=["i-020b6af9246d90e92"]).accepted
    refused = {
        "nonce_mismatch": appraise(PRODUCTION, nonce=nonce[::-1]),
        "public_key_missing": appraise(PRODUCTION, required_claims=["public_key", "nonce"]),
        "user_data_missing": appraise(PRODUCTION, required_claims=["user_data"]),
        "instance_not_allowed": appraise(PRODUCTION, instances=["i-020b6af9246d90e93"]),
        "evidence_time": appraise(PRODUCTION, at=expected(PRODUCTION)["timestamp_ms"] / 1000 + 301),
    }
    assert {code: [item.detail for item in result.refusals] for code, result in refused.items()} == {
        code: [code] for code in refused
    }


def test_debug_mode_is_refused() -> None:
    assert [item.detail for item in appraise(DEBUG).refusals] == ["debug_enabled", "nonce_missing"]


def test_the_documented_policy_accepts_it() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "attestation.md").read_text()
    found = re.search(r"```yaml\n(version: 1\nid: nitro-example\n.*?)```", text, re.DOTALL)
    assert found is not None
    at = expected(PRODUCTION)["timestamp_ms"] / 1000
    request = OfflineRequest(EvidenceKind.NITRO, evidence(PRODUCTION), parse_policy(found[1]), at)
    assert appraise_offline(request, NitroVerifier()).accepted
    debug = dataclasses.replace(request, evidence=evidence(DEBUG), at=expected(DEBUG)["timestamp_ms"] / 1000)
    assert appraise_offline(debug, NitroVerifier()).refusals[0].detail == "debug_enabled"


SPECIFICATION = "evervault_spec_valid_attestation_doc_in_non_debug_mode_with_correct_pcrs_time_sensitive.json"


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("evervault_non-debug-cert-containing-attestation-document-18-1-23.pem", []),
        ("evervault_debug-mode-cert-containing-attestation-doc-18-1-23.pem", ["debug_enabled"]),
    ],
)
def test_documents_in_certificates(name: str, reasons: list[str]) -> None:
    """Documents that their source keeps as a name of a TLS certificate, with the registers that it says they have."""
    registers = json.loads((vector_directory("nitro") / SPECIFICATION).read_text())["pcrs"]
    certificate = x509.load_pem_x509_certificates(evidence(name))[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    document = bytes.fromhex(max(names.get_values_for_type(x509.DNSName), key=len).partition(".")[0])
    at = certificate.not_valid_before_utc.timestamp()
    claims = NitroVerifier().verify(document, at=at)
    assert ({register: claims.measurements[register] for register in registers} == registers) == (not reasons)
    policy = nitro_policy({f"pcr{i}": claims.measurements[f"pcr{i}"] for i in (0, 1, 2, 8)}, required_claims=["nonce"])
    result = appraise_offline(OfflineRequest(EvidenceKind.NITRO, document, policy, at), NitroVerifier())
    assert [item.detail for item in result.refusals] == reasons


@pytest.mark.parametrize("name", [PRODUCTION, DEBUG])
def test_the_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tensafe evidence verify --kind nitro` decides about files what the library decides."""
    registers = {f"pcr{index}": expected(name)["pcrs"].get(str(index), "00" * 48) for index in (0, 1, 2)}
    policy = nitro_policy(registers, required_claims=["nonce"])
    (tmp_path / "policy.json").write_text(policy.model_dump_json(exclude_none=True))
    at = datetime.fromtimestamp(expected(name)["timestamp_ms"] // 1000, timezone.utc).isoformat()
    options = ["--kind", "nitro", "--evidence", str(vector_directory("nitro") / name), "--at", at, "--json"]
    code = run(["evidence", "verify", *options, "--policy", str(tmp_path / "policy.json")])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["reason"]) == ((0, "") if name == PRODUCTION else (3, "debug_enabled"))
    assert report["claims"]["details"]["module_id"] == expected(name)["module_id"]
