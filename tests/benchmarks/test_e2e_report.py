"""`benchmarks/e2e_report.py`: medians, shares, ratios to plaintext LoRA, and the goals beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.e2e_report import MODES, Report, draw, first_token, text, throughput

HE = {"wait_seconds": 1.0, "evaluate_seconds": 4.0, "encrypt_seconds": 2.0, "decrypt_seconds": 0.5, "bytes_up": 710.0}


def result(tokens: int, seconds: float, ttft: float, **he: float) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "ttft_ms": [ttft], "he": he}


def report() -> Report:
    speeds = {"base": 40, "plain_lora": 20, "he_lora": 8}
    return Report(
        "a machine",
        {"rounds": 3},
        [
            throughput(mode, 1, [result(speeds[mode], 10.0, 5.0, **(HE if mode == "he_lora" else {}))], 64)
            for mode in MODES
        ],
        [first_token(mode, 64, [result(1, 1.0, 400 / speeds[mode])]) for mode in MODES],
    )


def test_the_median_round_stands_for_all() -> None:
    rounds = [result(8, seconds, 10.0 * seconds, **HE) for seconds in (4.0, 10.0, 20.0)]
    record = throughput("he_lora", 1, rounds, 64)
    assert (record.tokens_per_s, record.tokens_per_s_min, record.tokens_per_s_max) == (0.8, 0.4, 2.0)
    assert record.ttft_ms == 100.0
    assert record.bytes_up_per_token == 10.0  # of 8 + 63 tokens
    # The coprocessor worked for 4 s, 3 of them while the base product ran.
    assert record.shares == {"encrypt": 0.2, "evaluate": 0.1, "wire": 0.0, "decrypt": 0.05, "base": 0.65}
    assert first_token("base", 64, rounds).ttft_ms == 100.0


def test_ratios_and_goals() -> None:
    lines = text(report()).splitlines()
    private = [line for line in lines if line.startswith("he_lora")]
    assert private[0].split()[6:8] == ["0.40", "0.35"]
    assert private[1].split()[6:8] == ["2.50", "3"]


def test_picture(tmp_path: Path) -> None:
    draw(report(), tmp_path / "e2e.png")
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_has_every_record() -> None:
    document = report().document()
    for kind in ("throughput", "first_token"):
        assert [record["mode"] for record in document[kind]] == list(MODES)
