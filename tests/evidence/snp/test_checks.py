"""What a policy's section makes of reports of a synthetic chip, through the whole appraisal."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import evidence_appraisal
from tensorguard.evidence.checks import ExpectedReportData
from tensorguard.evidence.claims import Claims, Role
from tensorguard.evidence.policy import Policy, parse_policy
from tensorguard.evidence.snp.product import Product
from tests.evidence.snp.conftest import verify
from tests.support.policies import SNP_SECTION, snp_policy
from tests.support.synthetic_pki import snp

FLOOR = SNP_SECTION["tcb_floors"]["milan"]["reported"]
VERSIONS = ("reported", "current", "committed", "launch")
CHIP = snp.HWID[Product.MILAN].hex()


def policy(values: dict[str, str] | None = None, **section: Any) -> Policy:
    debug = section.pop("allow_debug", False)
    document = snp_policy(values or {"measurement": "6d" * 48}, **section)
    return parse_policy(json.dumps({**document, "allow_debug": debug}))


def appraise(claims: Claims, rules: Policy, report_data: bytes = b"r" * 64) -> None:
    measurements = rules.roles[Role.COPROCESSOR].measurements
    evidence_appraisal(rules, exchange=[ExpectedReportData(report_data)], measurements=measurements).verify(claims)


def decision(rules: Policy | None = None, chip: snp.Chip | None = None, **report: Any) -> str:
    """`accepted`, or the reason code."""
    chip = chip or snp.chip()
    claims = verify(chip, report=chip.report(**report))
    try:
        appraise(claims, rules or policy())
    except EvidenceRefusedError as refused:
        return refused.detail
    return "accepted"


def test_accepted() -> None:
    assert decision() == "accepted"


def test_debug() -> None:
    assert decision(policy=0xB0000) == "debug_enabled"
    assert decision(policy(allow_debug=True), policy=0xB0000) == "accepted"


def test_report_data() -> None:
    assert decision(report_data=b"other".ljust(64)) == "report_data_mismatch"


@pytest.mark.parametrize(
    ("bit", "field", "reason"),
    [
        (16, "allow_smt", "smt_not_allowed"),
        (18, "allow_migration_agent", "migration_agent"),
        (21, "allow_cxl", "cxl_not_allowed"),
    ],
)
def test_what_weakens_a_guest(bit: int, field: str, reason: str) -> None:
    guest = 1 << 17 | 1 << bit
    assert decision(policy(**{field: False}), policy=guest) == reason
    assert decision(policy(**{field: True}), policy=guest) == "accepted"
    assert decision(policy(**{field: False}), policy=1 << 17) == "accepted"


@pytest.mark.parametrize(
    ("bit", "feature"),
    [
        (20, "single_socket"),
        (22, "memory_aes_256_xts"),
        (23, "rapl_disabled"),
        (24, "ciphertext_hiding"),
        (25, "page_swap_disabled"),
    ],
)
def test_what_a_guest_must_demand(bit: int, feature: str) -> None:
    rules = policy(required_guest_policy=[feature])
    assert decision(rules) == "guest_policy"
    assert decision(rules, policy=0x30000 | 1 << bit) == "accepted"


@pytest.mark.parametrize(
    ("bit", "feature"), [(1, "tsme"), (2, "ecc"), (3, "rapl_disabled"), (4, "ciphertext_hiding"), (5, "alias_check")]
)
def test_what_a_machine_must_have(bit: int, feature: str) -> None:
    rules = policy(required_platform=[feature])
    assert decision(rules, platform=0xFF & ~(1 << bit)) == "platform_feature"
    assert decision(rules, platform=1 << bit) == "accepted"


@pytest.mark.parametrize("vmpl", [1, 2, 3, 0xFFFFFFFF])
def test_vmpl(vmpl: int) -> None:
    assert decision(vmpl=vmpl) == "vmpl_not_allowed"
    if vmpl <= 3:
        assert decision(policy(vmpls=[0, vmpl]), vmpl=vmpl) == "accepted"


def test_abi() -> None:
    rules = policy(minimum_abi={"major": 1, "minor": 31})
    assert decision(rules, policy=0x30000 | 1 << 8 | 30) == "abi_below_minimum"
    assert decision(rules, policy=0x30000 | 0 << 8 | 255) == "abi_below_minimum"
    assert decision(rules, policy=0x30000 | 1 << 8 | 31) == "accepted"
    assert decision(rules, policy=0x30000 | 2 << 8 | 0) == "accepted"


def test_guest_svn() -> None:
    assert decision(policy(minimum_guest_svn=5), guest_svn=4) == "guest_svn_too_low"
    assert decision(policy(minimum_guest_svn=5), guest_svn=5) == "accepted"


@pytest.mark.parametrize("component", sorted(FLOOR))
@pytest.mark.parametrize("version", VERSIONS)
def test_floors_component_by_component(version: str, component: str) -> None:
    """One component of one version is one too low, and everything else as high as it gets."""
    highest = dict.fromkeys(FLOOR, 255)
    for value, expected in ((FLOOR[component] - 1, "tcb_below_floor"), (FLOOR[component], "accepted")):
        versions = {other: {**highest, component: value} if other == version else highest for other in VERSIONS}
        chip = snp.chip(tcb=versions["reported"])
        raw = {f"{other}_tcb": snp.tcb_bytes(Product.MILAN, **versions[other]) for other in VERSIONS}
        assert decision(chip=chip, **raw) == expected


def test_floors_of_turin() -> None:
    floor = {**FLOOR, "fmc": 1}
    rules = policy(tcb_floors={"turin": dict.fromkeys(VERSIONS, floor)})
    assert decision(rules, snp.chip(Product.TURIN)) == "accepted"
    assert decision(rules, snp.chip(Product.TURIN, tcb={"fmc": 0})) == "tcb_below_floor"


def test_a_product_without_floors() -> None:
    assert decision(chip=snp.chip(Product.GENOA)) == "product_not_allowed"
    both = copy.deepcopy(SNP_SECTION["tcb_floors"])
    both["genoa"] = both["milan"]
    assert decision(policy(tcb_floors=both), snp.chip(Product.GENOA)) == "accepted"


def test_signing_keys() -> None:
    vlek = snp.chip(Product.MILAN, "vlek")
    named = policy(signing_keys=["vlek"], csp_ids=[snp.CSP_ID])
    assert decision(chip=vlek) == "signing_key_not_allowed"
    assert decision(named, vlek) == "accepted"
    assert decision(named) == "signing_key_not_allowed"
    assert decision(policy(signing_keys=["vlek"], csp_ids=["CN=other.example"]), vlek) == "csp_not_allowed"


def test_chips() -> None:
    assert decision(policy(chip_ids=[CHIP])) == "accepted"
    assert decision(policy(chip_ids=["00" * 64, "ab" * 64])) == "chip_not_allowed"
    assert decision(policy(revoked_chip_ids=["ab" * 64])) == "accepted"
    assert decision(policy(revoked_chip_ids=["ab" * 64, CHIP])) == "chip_revoked"
    assert decision(policy(chip_ids=[CHIP], revoked_chip_ids=[CHIP])) == "chip_revoked"


def test_a_masked_chip_may_be_any() -> None:
    vlek = snp.chip(Product.MILAN, "vlek")
    accepts_vlek = {"signing_keys": ["vlek"], "csp_ids": [snp.CSP_ID]}
    assert decision(policy(**accepts_vlek, chip_ids=["00" * 64]), vlek) == "chip_not_allowed"
    assert decision(policy(**accepts_vlek, revoked_chip_ids=["ab" * 64]), vlek) == "chip_id_masked"
    assert decision(policy(**accepts_vlek, revoked_chip_ids=["ab" * 64]), vlek, chip_id=b"c" * 64) == "accepted"
    assert decision(policy(**accepts_vlek, revoked_chip_ids=["63" * 64]), vlek, chip_id=b"c" * 64) == "chip_revoked"


def test_a_revocation_list_that_is_required() -> None:
    chip = snp.chip()
    rules = policy(require_crl=True)
    assert decision(rules, chip) == "collateral_missing"
    appraise(verify(chip, endorsements=[*chip.endorsements, chip.ark.revoke()]), rules)


@pytest.mark.parametrize(
    ("register", "size"), [("measurement", 48), ("host_data", 32), ("id_key_digest", 48), ("author_key_digest", 48)]
)
def test_registers_of_a_measurement_tuple(register: str, size: int) -> None:
    registers = {"measurement": "6d" * 48, "host_data": "00" * 32, register: "01" * size}
    rules = policy(registers)
    fields = {register: b"\x01" * size, "key_bits": register == "author_key_digest"}
    assert decision(rules, **fields) == "accepted"
    assert decision(rules) == "measurement_not_allowed"


def test_claims_of_another_platform_are_refused() -> None:
    claims = verify(snp.chip())
    with pytest.raises(EvidenceRefusedError) as refused:
        appraise(dataclasses.replace(claims, details=None), policy())
    assert refused.value.detail == "malformed"


def test_debug_is_asked_first() -> None:
    """Then whether it is this exchange, then the platform, then the code."""
    everything = {"policy": 0xB0000 | 1 << 18, "report_data": b"x" * 64, "measurement": b"x" * 48}
    assert decision(**everything) == "debug_enabled"
    assert decision(**{**everything, "policy": 0x30000 | 1 << 18}) == "report_data_mismatch"
    assert decision(policy=0x30000 | 1 << 18, measurement=b"x" * 48) == "migration_agent"
    assert decision(measurement=b"x" * 48) == "measurement_not_allowed"
