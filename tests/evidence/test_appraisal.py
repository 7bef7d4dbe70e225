from __future__ import annotations

import dataclasses
import json

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import appraisal_of, require_evidence_kind
from tensorguard.evidence.checks import AllOf
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.policy import Policy, parse_policy
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tests.support.policies import TDX_SECTION

DATA = b"d" * 64
BINDING = Binding(DATA, b"n" * 32, b"public key")
TDX_CLAIMS = TdxClaims(
    quote_version=4,
    tcb_status=TcbStatus.UP_TO_DATE,
    advisory_ids=(),
    tcb_eval_data_number=17,
    collateral_issued_at=0,
    collateral_expires_at=2000,
    fmspc="00" * 6,
    ppid="00" * 16,
    dynamic_platform=False,
    cached_keys=False,
    smt_enabled=False,
    td_attributes="0000001000000000",
    xfam="00" * 8,
    tee_tcb_svn="00" * 16,
)
CLAIMS = Claims(EvidenceKind.SIMULATED, {"code": "ab" * 48}, DATA, 1000, False, Role.COPROCESSOR)


def tdx_registers(firmware: str, rest: str) -> dict[str, str]:
    return {"mrtd": firmware * 48, "rtmr0": rest * 48, "rtmr1": rest * 48, "rtmr2": rest * 48}


def policy(**changes: object) -> Policy:
    tdx = {"evidence_kind": "tdx", "values": tdx_registers("11", "22")}
    tdx_2 = {"evidence_kind": "tdx", "values": tdx_registers("33", "44")}
    simulated = {"evidence_kind": "simulated", "values": {"code": "ab" * 48}}
    document = {
        "version": 1,
        "id": "test",
        "evidence_kinds": ["simulated", "tdx"],
        "tenants": ["tenant"],
        "roles": {"coprocessor": {"measurements": [simulated, tdx, tdx_2]}},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        "tdx": TDX_SECTION,
        **changes,
    }
    return parse_policy(json.dumps(document))


def appraise(claims: Claims, rules: Policy, *, tenant: str = "tenant", role: Role = Role.COPROCESSOR) -> None:
    appraisal_of(rules, tenant=tenant, role=role, binding=BINDING, now=1000).verify(claims)


def refusal(claims: Claims = CLAIMS, rules: Policy | None = None, **expected: object) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        appraise(claims, rules or policy(), **expected)  # type: ignore[arg-type]
    return refused.value.detail


def test_accepted() -> None:
    appraise(CLAIMS, policy())


def test_each_condition_has_its_own_reason() -> None:
    change = dataclasses.replace
    assert refusal(change(CLAIMS, debug=True)) == "debug_enabled"
    assert refusal(change(CLAIMS, report_data=b"e" * 64)) == "report_data_mismatch"
    assert refusal(change(CLAIMS, report_data=b"")) == "report_data_mismatch"
    assert refusal(change(CLAIMS, issued_at=1301)) == "evidence_time"
    assert refusal(change(CLAIMS, issued_at=699)) == "evidence_time"
    assert refusal(change(CLAIMS, kind=EvidenceKind.SNP)) == "evidence_kind_not_allowed"
    assert refusal(change(CLAIMS, role=Role.INFERENCE)) == "role_mismatch"
    assert refusal(change(CLAIMS, measurements={"code": "ac" * 48})) == "measurement_not_allowed"
    assert refusal(change(CLAIMS, measurements={})) == "measurement_not_allowed"
    assert refusal(tenant="other") == "tenant_not_allowed"
    assert refusal(role=Role.INFERENCE) == "role_not_allowed"


def test_debug_needs_to_be_allowed_by_name() -> None:
    appraise(dataclasses.replace(CLAIMS, debug=True), policy(allow_debug=True))


def test_parts_of_different_tuples_do_not_add_up() -> None:
    tdx = dataclasses.replace(CLAIMS, kind=EvidenceKind.TDX, role=None, issued_at=None, details=TDX_CLAIMS)
    for pair in (("11", "22"), ("33", "44")):
        appraise(dataclasses.replace(tdx, measurements=tdx_registers(*pair)), policy())
    mixed = dataclasses.replace(tdx, measurements=tdx_registers("11", "44"))
    assert refusal(mixed) == "measurement_not_allowed"


def test_a_tuple_of_one_kind_is_no_good_for_another() -> None:
    disguised = dataclasses.replace(CLAIMS, kind=EvidenceKind.TDX, details=TDX_CLAIMS)
    assert refusal(disguised) == "measurement_not_allowed"


def test_claims_of_a_kind_must_have_what_its_section_asks() -> None:
    assert refusal(dataclasses.replace(CLAIMS, kind=EvidenceKind.TDX)) == "malformed"


def test_no_checks_accept_nothing() -> None:
    with pytest.raises(EvidenceRefusedError):
        AllOf(()).verify(CLAIMS)
    assert [refused.detail for refused in AllOf(()).refusals(CLAIMS)] == ["no_checks"]


def test_every_refusal_in_the_order_of_the_checks() -> None:
    checks = appraisal_of(policy(), tenant="tenant", role=Role.COPROCESSOR, binding=BINDING, now=1000)
    wrong = dataclasses.replace(CLAIMS, debug=True, report_data=b"", measurements={})
    assert [refused.detail for refused in checks.refusals(wrong)] == [
        "debug_enabled",
        "report_data_mismatch",
        "measurement_not_allowed",
    ]
    assert refusal(wrong) == "debug_enabled"
    assert list(checks.refusals(CLAIMS)) == []


def test_simulated_must_be_named() -> None:
    hardware = policy(
        evidence_kinds=["tdx"],
        roles={"coprocessor": {"measurements": [{"evidence_kind": "tdx", "values": tdx_registers("11", "22")}]}},
    )
    with pytest.raises(EvidenceRefusedError) as refused:
        require_evidence_kind(hardware, EvidenceKind.SIMULATED)
    assert refused.value.detail == "evidence_kind_not_allowed"
    assert refusal(CLAIMS, hardware) == "evidence_kind_not_allowed"
