"""`tensafe plan`: what it explains, and sizes as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorguard.ckks import compile_plans, get_parameter_set
from tensorguard.cli.main import run
from tensorguard.cli.sizes import parse_bytes, show_bytes
from tensorguard.errors import InvalidInputError
from tests.support.adapters import write_base_model


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["plan", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_matrix_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    result = explained(capsys, "--d", "4096", "--rows", "48", "--tokens", "1")
    times = [plan["microseconds"] for plan in result["plans"]]
    assert times == sorted(times) and len(times) > 3
    packed = compile_plans(get_parameter_set("n4096-q90-w12"), 4096, 48)
    assert result["packed_plans"] == [plan.identifier for plan in packed]
    assert result["packed_choice"] in result["packed_plans"]
    assert run(["plan", "--d", "4096", "--rows", "48"]) == 0
    shown = capsys.readouterr().out
    for text in (result["plans"][0]["plan"], "of the ring's 4096", "128 outputs", "MiB of at most", "modelled time"):
        assert text in shown


def test_a_memory_limit_that_decides_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    free = explained(capsys, "--d", "130", "--rows", "40")
    least = min(plan["memory_bytes"] for plan in free["plans"])
    tight = explained(capsys, "--d", "130", "--rows", "40", "--memory-limit", str(least))
    assert tight["plans"][0]["memory_bytes"] <= least
    assert (tight["plans"][0]["plan"] != free["plans"][0]["plan"]) == any(
        "over the limit" in line for line in tight["limits"]
    )


def test_an_adapter_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    llama = explained(capsys, "--adapter-shape", "llama-3-8b")
    assert llama["memory_bytes"] <= 1 << 30
    assert [(group["rows"], group["d"]) for group in llama["groups"]] == [(48, 4096), (16, 4096)]
    full = explained(capsys, "--adapter-shape", "llama-3-8b", "--mode", "full")
    assert [group["rows"] for group in full["groups"]] == [6144, 4096]
    limited = explained(capsys, "--adapter-shape", "llama-3-8b", "--memory-limit", "200M")
    assert limited["memory_bytes"] <= 200 << 20
    model = explained(
        capsys, "--base-model", str(write_base_model(tmp_path)), "--rank", "4", "--targets", "q_proj,down_proj"
    )
    assert [(group["group"], group["rows"]) for group in model["groups"]] == [("qkv", 4), ("down", 4)]
    assert run(["plan", "--adapter-shape", "llama-3-8b"]) == 0
    assert "In all:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name a matrix"),
        (["--d", "10"], "name a matrix"),
        (["--rows", "10"], "name a matrix"),
        (["--d", "10", "--rows", "2", "--adapter-shape", "llama-3-8b"], "name a matrix"),
        (["--adapter-shape", "gpt-9"], "no shape 'gpt-9'"),
        (["--adapter-shape", "llama-3-8b", "--targets", "lm_head"], "no projection 'lm_head'"),
        (["--base-model", "/nowhere"], "cannot read /nowhere/config.json"),
        (["--d", "10", "--rows", "2", "--memory-limit", "much"], "is not a size"),
        (["--d", "10", "--rows", "2", "--memory-limit", "500"], "allow it at least"),
        (["--d", "10", "--rows", "2", "--parameters", "n1"], "unknown parameter set"),
    ],
)
def test_wrong_options_say_what_to_change(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert run(["plan", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("7", "2K", "800m", "1GiB", "1 GB", "3T")] == [
        *(7, 2048, 800 << 20, 1 << 30, 1 << 30, 3 << 40),
    ]
    for text in ("", "0", "-1", "1.5G", "G", "1X", "٣", "1e9"):
        with pytest.raises(InvalidInputError, match="is not a size"):
            parse_bytes(text)
    assert [show_bytes(count) for count in (7, 2048, 1000 << 10, 1 << 30)] == ["7 B", "2 KiB", "0.977 MiB", "1 GiB"]
