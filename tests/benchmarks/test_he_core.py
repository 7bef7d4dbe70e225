"""`benchmarks/he_core.py` on tiny shapes: the records, and that every engine computes A·x."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS_PYTHON = Path(os.environ.get("TENSAFE_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
FIELDS = {
    "engine": str,
    "d": int,
    "rows": int,
    "tokens": int,
    "encrypt_ms": float,
    "evaluate_ms": float,
    "decrypt_ms": float,
    "bytes_up": int,
    "bytes_down": int,
    "key_bytes": int,
    "rel_error": float,
    "function_private": bool,
    "evaluation_key_bytes": int,
    "repeats": int,
    "note": str,
}
PRIVATE = {"tensafe-cpu", "tensafe-cpu (pools)", "tensafe-openfhe"}
PEERS = ["openfhe-rotate-and-sum", "openfhe-bsgs", "openfhe-bsgs-n4096", "openfhe-columns", "openfhe-coefficients"]


def run(folder: Path, *arguments: str, peers_python: Path = PEERS_PYTHON) -> dict[str, Any]:
    path = folder / "he_core.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "he_core.py"), "--json", str(path), "--quick"]
    command += ["--peers-python", str(peers_python), "--repeats", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert path.with_suffix(".txt").read_text() == done.stdout
    assert not path.with_suffix(".png").exists() or path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report: dict[str, Any] = json.loads(path.read_text())
    for record in report["records"]:
        assert {name: type(value) for name, value in record.items()} == FIELDS
        assert record["function_private"] == (record["engine"] in PRIVATE)
        assert min(record["encrypt_ms"], record["evaluate_ms"], record["decrypt_ms"]) > 0
    return report


def test_our_rows(tmp_path: Path) -> None:
    report = run(tmp_path, "--d", "40", "--rows", "3", "--tokens", "1", "2", "--engines", "tensafe-cpu")
    assert [(r["engine"], r["d"], r["rows"], r["tokens"]) for r in report["records"]] == [
        ("tensafe-cpu", 40, 3, 1),
        ("tensafe-cpu", 40, 3, 2),
    ]
    for record in report["records"]:
        assert record["rel_error"] < 2**-9
        assert record["evaluation_key_bytes"] == 0 < record["key_bytes"]
        # b alone is 3 primes of 4,096 residues of 30 bits, c1 one prime of them.
        assert record["bytes_up"] > 3 * 4096 * 30 / 8 > record["bytes_down"] > 4096 * 30 / 8
        assert record["repeats"] * record["tokens"] >= 64
    assert not report["unavailable"] and not report["skipped"]
    assert (tmp_path / "he_core.png").exists()


def test_peers_that_cannot_run_are_listed_with_the_reason(tmp_path: Path) -> None:
    arguments = ("--d", "40", "--rows", "3", "--tokens", "1", "--engines", "openfhe-bsgs", "tenseal-mm")
    report = run(tmp_path, *arguments, peers_python=tmp_path / "no" / "python")
    assert set(report["unavailable"]) == {"openfhe-bsgs", "tenseal-mm"}
    assert all("setup_peers.sh" in reason for reason in report["unavailable"].values())
    # An interpreter without the packages: their import fails in the worker.
    report = run(tmp_path, *arguments, peers_python=Path(sys.executable))
    assert set(report["unavailable"]) == {"openfhe-bsgs", "tenseal-mm"}
    assert "openfhe" in report["unavailable"]["openfhe-bsgs"] and "tenseal" in report["unavailable"]["tenseal-mm"]


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no .venv-peers: scripts/setup_peers.sh makes it")
def test_openfhe_peers_compute_the_product(tmp_path: Path) -> None:
    """More rows than a power of two, channels that fill no slot count, more tokens than one polynomial takes."""
    report = run(tmp_path, "--d", "150", "--rows", "5", "--tokens", "3", "--engines", *PEERS)
    assert [record["engine"] for record in report["records"]] == PEERS, report["unavailable"]
    assert all(record["rel_error"] < 2e-3 for record in report["records"])
    rotations = [record["evaluation_key_bytes"] > 0 for record in report["records"]]
    assert rotations == [True, True, True, False, False]
    columns = next(record for record in report["records"] if record["engine"] == "openfhe-columns")
    assert "measured on 128 of 150 channels" in columns["note"]


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no .venv-peers: scripts/setup_peers.sh makes it")
def test_our_openfhe_backend_computes_the_product(tmp_path: Path) -> None:
    engines = ("tensafe-cpu", "tensafe-openfhe")
    report = run(tmp_path, "--d", "40", "--rows", "3", "--tokens", "2", "--engines", *engines)
    assert [record["engine"] for record in report["records"]] == list(engines), report["unavailable"]
    cpu, openfhe = report["records"]
    assert openfhe["rel_error"] < 2**-9
    assert (openfhe["bytes_up"], openfhe["bytes_down"]) == (cpu["bytes_up"], cpu["bytes_down"])


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no .venv-peers: scripts/setup_peers.sh makes it")
def test_tenseal_computes_the_product(tmp_path: Path) -> None:
    report = run(tmp_path, "--d", "16", "--rows", "3", "--tokens", "1", "--engines", "tenseal-mm")
    assert [record["engine"] for record in report["records"]] == ["tenseal-mm"], report["unavailable"]
    assert report["records"][0]["rel_error"] < 1e-3
