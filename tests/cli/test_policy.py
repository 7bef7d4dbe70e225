"""`tensafe policy lint` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorguard.cli.main import run
from tests.support.policies import snp_policy, tdx_policy

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = dict.fromkeys(("mrtd", "rtmr0", "rtmr1", "rtmr2"), "ab" * 48)
STRICT = tdx_policy(REGISTERS, machines=["00" * 16])


def lint(tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: dict[str, Any]) -> tuple[int, list[str]]:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    capsys.readouterr()
    code = run(["policy", "lint", str(path), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)["permits"] if code == 0 else []


def test_a_strict_policy_permits_nothing_special(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(tmp_path, capsys, STRICT) == (0, [])


def test_what_a_policy_permits_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = dict.fromkeys(("allow_dynamic_platform", "allow_cached_keys", "allow_smt"), True)
    loose = tdx_policy(REGISTERS, tcb_statuses=["UpToDate", "OutOfDate"], **flags)
    loose.update(allow_debug=True, allow_x25519=True, evidence_kinds=["tdx", "simulated"])
    code, permits = lint(tmp_path, capsys, loose)
    assert code == 0
    for words, line in zip(
        (
            "simulated evidence",
            "debug mode",
            "X25519 alone",
            "OutOfDate",
            "any TDX machine",
            *(f"(tdx.{flag})" for flag in flags),
            "no role has",
        ),
        permits,
        strict=True,
    ):
        assert words in line


def test_what_a_policy_for_sev_snp_permits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registers = {"measurement": "ab" * 48}
    assert lint(tmp_path, capsys, snp_policy(registers, chip_ids=["00" * 64], require_crl=True, allow_smt=False)) == (
        0,
        [],
    )
    loose = snp_policy(
        registers, allow_migration_agent=True, allow_cxl=True, signing_keys=["vlek"], csp_ids=["CN=cloud.example"]
    )
    _, permits = lint(tmp_path, capsys, loose)
    for words, line in zip(
        ("migration agent", "CN=cloud.example", "any SEV-SNP chip", "revocation list", "allow_smt", "allow_cxl"),
        permits,
        strict=True,
    ):
        assert words in line


def test_what_a_policy_for_nitro_permits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registers = dict.fromkeys(("pcr0", "pcr1", "pcr2"), "ab" * 48)
    policy = {**STRICT, "evidence_kinds": ["nitro"], "nitro": {"required_claims": ["nonce"], "instances": "any"}}
    policy["roles"] = {"coprocessor": {"measurements": [{"evidence_kind": "nitro", "values": registers}]}}
    del policy["tdx"]
    [line] = lint(tmp_path, capsys, policy)[1]
    assert "any EC2 instance" in line
    policy["nitro"]["instances"] = ["i-020b6af9246d90e92"]
    assert lint(tmp_path, capsys, policy) == (0, [])


def test_a_policy_that_an_attestor_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(tmp_path, capsys, {**STRICT, "tdx": {**STRICT["tdx"], "alow_smt": True}})[0] == 2
    assert run(["policy", "lint", str(tmp_path / "nowhere")]) == 2


def test_lint_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(tdx_policy(REGISTERS)))
    assert run(["policy", "lint", str(path)]) == 0
    assert "permits: any TDX machine" in capsys.readouterr().out


def test_published_schema_is_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy", "schema"]) == 0
    published = (ROOT / "docs" / "policy.schema.json").read_text()
    assert published == capsys.readouterr().out, "run: tensafe policy schema > docs/policy.schema.json"


def test_schema_has_no_room_for_unknown_fields() -> None:
    schema = json.loads((ROOT / "docs" / "policy.schema.json").read_text())
    for item in (schema, *schema["$defs"].values()):
        if item.get("type") == "object":
            assert item["additionalProperties"] is False, item["title"]
