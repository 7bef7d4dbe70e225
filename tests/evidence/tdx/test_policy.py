"""The section `tdx` of a policy, and each of its checks alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from tensorguard.errors import EvidenceRefusedError, PolicyError
from tensorguard.evidence.checks import AllOf
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.policy import parse_policy
from tensorguard.evidence.tdx.checks import AllowedTcbStatus, tdx_checks
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tensorguard.evidence.tdx.policy import TdxPolicy
from tests.support.policies import TDX_SECTION, tdx_policy

REGISTERS = dict.fromkeys(("mrtd", "rtmr0", "rtmr1", "rtmr2"), "ab" * 48)
GOOD = TdxClaims(
    quote_version=4,
    tcb_status=TcbStatus.UP_TO_DATE,
    advisory_ids=("INTEL-SA-00615",),
    tcb_eval_data_number=17,
    collateral_issued_at=0,
    collateral_expires_at=2000,
    fmspc="a0b0c0d0e0f0",
    ppid="00" * 16,
    dynamic_platform=False,
    cached_keys=False,
    smt_enabled=False,
    td_attributes="0000001000000000",
    xfam="e702060000000000",
    tee_tcb_svn="00" * 16,
)


def judge(section: dict[str, Any] | None = None, **changes: Any) -> str:
    claims = Claims(EvidenceKind.TDX, {}, b"", None, False, details=dataclasses.replace(GOOD, **changes))
    policy = TdxPolicy.model_validate({**TDX_SECTION, **(section or {})})
    try:
        AllOf(tdx_checks(policy)).verify(claims)
    except EvidenceRefusedError as refused:
        return refused.detail
    return ""


def test_accepted() -> None:
    assert judge() == ""


@pytest.mark.parametrize("status", [status for status in TcbStatus if status is not TcbStatus.UP_TO_DATE])
def test_status(status: TcbStatus) -> None:
    assert judge(tcb_status=status) == "tcb_status_not_allowed"
    if status is not TcbStatus.REVOKED:
        assert judge({"tcb_statuses": [status.value]}, tcb_status=status) == ""
        assert judge({"tcb_statuses": [status.value]}) == "tcb_status_not_allowed"


def test_revoked_passes_no_check() -> None:
    claims = Claims(
        EvidenceKind.TDX, {}, b"", None, False, details=dataclasses.replace(GOOD, tcb_status=TcbStatus.REVOKED)
    )
    with pytest.raises(EvidenceRefusedError):
        AllowedTcbStatus([TcbStatus.REVOKED]).verify(claims)


def test_each_field() -> None:
    assert judge({"denied_advisories": ["INTEL-SA-00837"]}) == ""
    assert judge({"denied_advisories": ["INTEL-SA-00615"]}) == "advisory_denied"
    assert judge({"denied_advisories": ["INTEL-SA-00615"]}, advisory_ids=("intel-sa-00615",)) == "advisory_denied"
    assert judge(tcb_eval_data_number=16) == "tcb_eval_data_number"
    assert judge({"machines": ["11" * 16]}) == "machine_not_allowed"
    assert judge({"machines": ["11" * 16, "00" * 16]}) == ""
    assert judge({"fmspcs": ["b0b0c0d0e0f0"]}) == "fmspc_not_allowed"
    assert judge({"fmspcs": ["a0b0c0d0e0f0"]}) == ""
    assert judge(td_attributes="0000005000000000") == "td_attributes_not_allowed"
    assert judge({"td_attributes": ["0000005000000000"]}, td_attributes="0000005000000000") == ""
    assert judge({"xfams": ["e702060000000001"]}) == "xfam_not_allowed"
    assert judge({"xfams": ["e702060000000000"]}) == ""


@pytest.mark.parametrize("flag", ["dynamic_platform", "cached_keys", "smt_enabled"])
def test_flags_must_be_off_unless_allowed(flag: str) -> None:
    """A certificate that does not say is no certificate that says no."""
    allowed = {f"allow_{flag.removesuffix('_enabled')}": True}
    for value in (True, None):
        assert judge(**{flag: value}) == f"{flag}_not_allowed"
        assert judge(allowed, **{flag: value}) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, ...) for name in TDX_SECTION),
        ("tcb_statuses", []),
        ("tcb_statuses", ["Revoked"]),
        ("tcb_statuses", ["UpToDate", "Fine"]),
        ("denied_advisories", ["CVE-2024-1"]),
        ("min_tcb_eval_data_number", 0),
        ("min_tcb_eval_data_number", "17"),
        ("allow_smt", "no"),
        ("machines", []),
        ("machines", "all"),
        ("machines", ["0011"]),
        ("fmspcs", []),
        ("fmspcs", ["A0B0C0D0E0F0"]),
        ("td_attributes", []),
        ("xfams", []),
        ("alow_smt", True),
    ],
)
def test_the_section_is_strict(field: str, value: object) -> None:
    policy = copy.deepcopy(tdx_policy(REGISTERS))
    if value is ...:
        del policy["tdx"][field]
    else:
        policy["tdx"][field] = value
    with pytest.raises(PolicyError, match=rf"tdx\.{field}"):
        parse_policy(json.dumps(policy))


def test_section_and_kind_belong_together() -> None:
    policy = tdx_policy(REGISTERS)
    del policy["tdx"]
    with pytest.raises(PolicyError, match="section 'tdx'"):
        parse_policy(json.dumps(policy))
    simulated = [{"evidence_kind": "simulated", "values": {"code": "ab" * 48}}]
    policy = {
        **tdx_policy(REGISTERS),
        "evidence_kinds": ["simulated"],
        "roles": {"coprocessor": {"measurements": simulated}},
    }
    with pytest.raises(PolicyError, match="does not name that kind"):
        parse_policy(json.dumps(policy))


@pytest.mark.parametrize("register", ["mrtd", "rtmr0", "rtmr1", "rtmr2"])
def test_a_tuple_names_firmware_and_system(register: str) -> None:
    registers = {name: value for name, value in REGISTERS.items() if name != register}
    with pytest.raises(PolicyError, match=register):
        parse_policy(json.dumps(tdx_policy(registers)))
