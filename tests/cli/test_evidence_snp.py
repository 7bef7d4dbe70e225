"""`tensafe evidence verify --kind snp` on real reports, with the policy that docs/attestation.md has for one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tensorguard.cli.main import run
from tests.support.attestation_vectors import vector_directory

DOCUMENT = Path(__file__).parents[2] / "docs" / "attestation.md"


@pytest.mark.parametrize(
    ("report", "options", "code", "reason"),
    [
        ("virtee_report_milan.hex", [], 0, ""),
        ("virtee_report_milan.hex", ["--report-data", "00" * 64], 3, "report_data_mismatch"),
        ("virtee_report_milan.hex", ["--at", "2031-01-01T00:00:00Z"], 3, "certificate_expired"),
        ("gosev_attestation.bin", [], 3, "debug_enabled"),
        ("ms_turin_attestation_report.bin", [], 3, "product_not_allowed"),
    ],
)
def test_real_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str, options: list[str], code: int, reason: str
) -> None:
    folder = vector_directory("snp")
    [entry] = [item for item in json.loads((folder / "expected.json").read_text()) if item["report"] == report]
    policy = tmp_path / "policy.yaml"
    found = re.search(r"```yaml\n(version: 1\nid: snp-example.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    policy.write_text(found[1])
    arguments = ["evidence", "verify", "--kind", "snp", "--evidence", str(folder / report), "--policy", str(policy)]
    for name in (entry["chain"], entry["vek"]):
        arguments += ["--endorsements", str(folder / name)]
    if "--at" not in options:
        arguments += ["--at", entry["verify_at"]]
    capsys.readouterr()
    assert run([*arguments, *options, "--json"]) == code
    decision = json.loads(capsys.readouterr().out)
    assert (decision["accepted"], decision["reason"]) == (code == 0, reason)
    if reason != "certificate_expired":
        assert decision["claims"]["measurements"]["measurement"] == entry["measurement"]
        assert decision["claims"]["details"]["reported_tcb"]["microcode"] == entry["reported_tcb"]["ucode"]
