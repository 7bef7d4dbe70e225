"""Real quotes, judged as the sources of the vectors say, at the time they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import evidence_appraisal
from tensorguard.evidence.checks import AllOf
from tensorguard.evidence.claims import Claims, Role
from tensorguard.evidence.policy import parse_policy
from tensorguard.evidence.tdx.checks import tdx_checks
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tensorguard.evidence.tdx.policy import TdxPolicy
from tensorguard.evidence.tdx.quote import parse_quote
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.attestation_vectors import vector_directory
from tests.support.policies import TDX_SECTION

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "attestation.md"
COLLATERAL = {
    "tdx_quote": "dcapqvl_tdx_quote_collateral.json",
    "tdx_quote_outdated": "dcapqvl_tdx_quote_outdated_collateral.json",
    "cda_90c06f": "assembled_cda_90c06f_collateral.json",
    "cda_50806f": "assembled_cda_50806f_collateral.json",
}
REASONS = {
    "ERROR: Verification failed: No matching TCB level found": "tcb_level_not_found",
    "ERROR: Verification failed: Debug mode is enabled": "debug_enabled",
}
CLOUD = {"allow_dynamic_platform": True, "allow_cached_keys": True, "allow_smt": True}


@pytest.fixture(scope="module")
def folder() -> Path:
    return vector_directory("tdx")


def judge(claims: Claims, **changes: Any) -> str:
    try:
        AllOf(tdx_checks(TdxPolicy.model_validate({**TDX_SECTION, **changes}))).verify(claims)
    except EvidenceRefusedError as refused:
        return refused.detail
    return "accepted"


@pytest.mark.parametrize("number", range(7))
def test_each_gives_what_its_source_says(folder: Path, number: int) -> None:
    expected = json.loads((folder / "expected.json").read_text())[number]
    quote = (folder / expected["quote"]).read_bytes()
    collateral = (folder / COLLATERAL[expected["collateral"]]).read_bytes()
    at = expected["verify_at_unix"]
    if expected["verify"] in REASONS:
        with pytest.raises(EvidenceRefusedError) as refused:
            TdxVerifier().verify(quote, [collateral], at=at)
        assert refused.value.detail == REASONS[expected["verify"]]
        return
    claims = TdxVerifier().verify(quote, [collateral], at=at)
    assert isinstance(claims.details, TdxClaims)
    assert claims.details.tcb_status is TcbStatus(expected["verify"])
    assert list(claims.details.advisory_ids) == expected["strict_cloud"]["advisory_ids"]
    assert claims.details.tcb_eval_data_number == expected["strict_cloud"]["eval_data_number"]
    assert claims.details.fmspc == expected["fmspc"].lower()
    assert (claims.details.td_attributes, claims.details.xfam) == (expected["td_attributes"], expected["xfam"])
    assert claims.report_data.hex() == expected["report_data"]
    assert claims.measurements["mrtd"] == expected["mr_td"]
    assert claims.measurements["mrseam"] == expected["mr_seam"]
    assert [claims.measurements[f"rtmr{i}"] for i in range(4)] == expected["rtmr"]
    assert judge(claims) == "dynamic_platform_not_allowed"
    assert judge(claims, allow_dynamic_platform=True) == "cached_keys_not_allowed"
    assert judge(claims, allow_dynamic_platform=True, allow_cached_keys=True) == "smt_enabled_not_allowed"
    assert judge(claims, **CLOUD) == "accepted"
    assert judge(claims, **CLOUD, min_tcb_eval_data_number=claims.details.tcb_eval_data_number) == "accepted"
    beyond = claims.details.tcb_eval_data_number + 1
    assert judge(claims, **CLOUD, min_tcb_eval_data_number=beyond) == "tcb_eval_data_number"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_outside_the_window_each_is_refused(folder: Path, number: int) -> None:
    expected = json.loads((folder / "expected.json").read_text())[number]
    quote = (folder / expected["quote"]).read_bytes()
    collateral = (folder / COLLATERAL[expected["collateral"]]).read_bytes()
    window = expected["verify_at_unix"] - 29 * 24 * 3600, expected["verify_at_unix"] + 3601
    for at, reason in zip((window[0] - 7 * 24 * 3600, window[1]), ("not_yet_valid", "expired"), strict=True):
        with pytest.raises(EvidenceRefusedError) as refused:
            TdxVerifier().verify(quote, [collateral], at=at)
        assert refused.value.detail == f"collateral_{reason}"


def test_collateral_as_intels_service_answers_it(folder: Path) -> None:
    """The parts that one of the JSON files was put together from."""
    parts = [
        (folder / name).read_bytes()
        for name in (
            "cda_tcb_info_90c06f000000.json",
            "cda_tcb_info_50806f000000.json",
            "cda_td_qe_identity.json",
            "cda_tcb_signing_chain.pem",
            "cda_root_ca_crl.der",
            "cda_pck_crl_platform.der",
        )
    ]
    quote = (folder / "gotdx_quote_v5_sample.dat").read_bytes()
    whole = (folder / COLLATERAL["cda_90c06f"]).read_bytes()
    at = 1_776_287_169
    assert TdxVerifier().verify(quote, parts, at=at) == TdxVerifier().verify(quote, [whole], at=at)


def test_the_documented_policy_accepts_the_quote_it_is_for(folder: Path) -> None:
    found = re.search(r"```yaml\n(version: 1\nid: tdx-example\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    policy = parse_policy(found[1])
    measurements = policy.roles[Role.COPROCESSOR].measurements
    appraisal = evidence_appraisal(policy, exchange=[], measurements=measurements)
    for number, accepted in ((0, True), (1, False)):
        expected = json.loads((folder / "expected.json").read_text())[number]
        collateral = (folder / COLLATERAL[expected["collateral"]]).read_bytes()
        quote = (folder / expected["quote"]).read_bytes()
        claims = TdxVerifier().verify(quote, [collateral], at=expected["verify_at_unix"])
        reasons = [refused.detail for refused in appraisal.refusals(claims)]
        assert reasons == ([] if accepted else ["fmspc_not_allowed", "measurement_not_allowed"])


def test_an_sgx_quote_is_not_tdx(folder: Path) -> None:
    quote = (folder / "dcapqvl_sgx_quote").read_bytes()
    collateral = (folder / "dcapqvl_sgx_quote_collateral.json").read_bytes()
    with pytest.raises(EvidenceRefusedError) as refused:
        TdxVerifier().verify(quote, [collateral], at=1_752_000_000)
    assert refused.value.detail == "not_tdx"


@pytest.mark.parametrize(
    "name",
    [
        "cda_tdx_quote_live.dat",
        "trustee_tdx_quote_6.dat",
        "gotdx_cos-113-tdx-quote.dat",
        "dcapqvl_tdx-quote.hex",
        "dcapqvl_quote-from-tappd.hex",
    ],
)
def test_quotes_without_collateral_are_well_formed(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    quote = bytes.fromhex(data.decode().removeprefix("0x")) if name.endswith("hex") else data
    assert parse_quote(quote).padding.strip(b"\0") == b""
    with pytest.raises(EvidenceRefusedError) as refused:
        TdxVerifier().verify(quote, at=1_776_000_000)
    assert refused.value.detail == "collateral_missing"
