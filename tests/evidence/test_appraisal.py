from __future__ import annotations

import dataclasses
import json

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import AllOf, appraisal_of, require_evidence_kind
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.policy import Policy, parse_policy

DATA = b"d" * 64
CLAIMS = Claims(EvidenceKind.SIMULATED, {"code": "ab" * 48}, DATA, 1000, False, Role.COPROCESSOR)


def policy(**changes: object) -> Policy:
    tdx = {"evidence_kind": "tdx", "values": {"mrtd": "11" * 48, "rtmr0": "22" * 48}}
    tdx_2 = {"evidence_kind": "tdx", "values": {"mrtd": "33" * 48, "rtmr0": "44" * 48}}
    simulated = {"evidence_kind": "simulated", "values": {"code": "ab" * 48}}
    document = {
        "version": 1,
        "id": "test",
        "evidence_kinds": ["simulated", "tdx"],
        "tenants": ["tenant"],
        "roles": {"coprocessor": {"measurements": [simulated, tdx, tdx_2]}},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        **changes,
    }
    return parse_policy(json.dumps(document))


def appraise(claims: Claims, rules: Policy, *, tenant: str = "tenant", role: Role = Role.COPROCESSOR) -> None:
    appraisal_of(rules, tenant=tenant, role=role, report_data=DATA, now=1000).verify(claims)


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
    tdx = dataclasses.replace(CLAIMS, kind=EvidenceKind.TDX, role=None, issued_at=None)
    for pair in (("11", "22"), ("33", "44")):
        appraise(dataclasses.replace(tdx, measurements={"mrtd": pair[0] * 48, "rtmr0": pair[1] * 48}), policy())
    mixed = dataclasses.replace(tdx, measurements={"mrtd": "11" * 48, "rtmr0": "44" * 48})
    assert refusal(mixed) == "measurement_not_allowed"


def test_a_tuple_of_one_kind_is_no_good_for_another() -> None:
    disguised = dataclasses.replace(CLAIMS, kind=EvidenceKind.TDX)
    assert refusal(disguised) == "measurement_not_allowed"


def test_no_checks_accept_nothing() -> None:
    with pytest.raises(EvidenceRefusedError):
        AllOf(()).verify(CLAIMS)


def test_simulated_must_be_named() -> None:
    hardware = policy(
        evidence_kinds=["tdx"],
        roles={"coprocessor": {"measurements": [{"evidence_kind": "tdx", "values": {"mrtd": "11" * 48}}]}},
    )
    with pytest.raises(EvidenceRefusedError) as refused:
        require_evidence_kind(hardware, EvidenceKind.SIMULATED)
    assert refused.value.detail == "evidence_kind_not_allowed"
    assert refusal(CLAIMS, hardware) == "evidence_kind_not_allowed"
