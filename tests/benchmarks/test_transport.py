from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_both_transports_between_two_processes(tmp_path: Path) -> None:
    """The command works, and frames of every size pass between real processes both ways. Times are not judged."""
    report = tmp_path / "transport.json"
    command = [sys.executable, "benchmarks/transport.py", "--calls", "16", "--json", str(report)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    records = json.loads(report.read_text())["records"]
    assert {(r["transport"], r["bytes_up"] // 1000, r["bytes_down"] // 1000) for r in records} == {
        (transport, *sizes) for transport in ("inline", "shared_memory") for sizes in ((46, 15), (368, 30), (1014, 338))
    }
    assert all(r["calls"] == 16 and 0 < r["median_us"] <= r["p90_us"] for r in records)
