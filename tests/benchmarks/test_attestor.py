from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attestor_report import quantile

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_kind_of_evidence_and_of_request(tmp_path: Path) -> None:
    """The command works against a real attestor process. Times are not judged."""
    report = tmp_path / "attestor.json"
    command = [sys.executable, "benchmarks/attestor.py", "--quick", "--folder", str(tmp_path), "--json", str(report)]
    command += ["--picture", str(tmp_path / "attestor.png")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(report.read_text())
    kinds = [record["kind"] for record in document["verifications"]]
    assert kinds == ["Intel TDX", "AMD SEV-SNP", "AWS Nitro", "NVIDIA, one GPU"]
    assert [(record["request"], record["workloads"]) for record in document["requests"]] == [
        (name, workloads) for workloads in (1, 4) for name in ("attestation", "key release", "lease renewal")
    ]
    for record in (*document["verifications"], *document["requests"]):
        assert 0 < record["p50_ms"] <= record["p99_ms"] and record["per_second"] > 0
    assert (tmp_path / "attestor.png").stat().st_size > 10_000
    assert "processors" in result.stdout and "on the disk in" in result.stdout


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.001, 1)])
def test_quantiles_are_values_that_occurred(share: float, expected: int) -> None:
    assert quantile(range(1, 101), share) == expected
