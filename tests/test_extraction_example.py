"""The regression attack of docs/threat-model.md works on logged tokens, and metering ends it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.he_lora.metering import TokenMeter
from tensorguard.errors import BudgetExhaustedError
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tests.support.coprocessor import ADAPTER, running_world

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "extraction" / "extract.py"


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("extraction_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_script_shows_what_it_says(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "extraction.png"
    result = example.main(["--quick", "--json", str(tmp_path / "x.json")])
    errors = {r["logged"]: r["matrix_error"] for r in result["unmetered"] if r["tokens"] == "independent tokens"}
    d_in = result["d_in"]
    assert errors[d_in // 2] > 0.5, "half of the tokens give about half of the energy"
    assert errors[4 * d_in] < 2e-4, "more than d_in tokens give all of it"
    for record in result["metered"]:
        assert record["answered"] == record["budget"]
        assert (record["matrix_error"] > 0.5) == (record["budget"] < d_in)
    assert "budget_exhausted" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    example.draw(result["unmetered"], d_in, picture)
    assert picture.stat().st_size > 10_000


def test_without_its_meter_the_script_says_so(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenMeter, "charge", lambda *_: None)
    with pytest.raises(SystemExit, match="a defect"):
        example.metered_attack(example.small_target(), [16])


def test_the_attack_over_grpc_ends_at_the_budget(tmp_path: Path) -> None:
    """Two sessions, one after the other, of a host that logs: together they get no more than the release's budget."""
    d_in, budget = 48, 40
    logged: list[tuple[Any, Any]] = []
    with running_world(tmp_path, tokens_per_release=budget, tokens_per_lease=budget) as world:
        for seed in range(2):
            session = CoprocessorSession.open(
                world.endpoint,
                world.workload(),
                verify_keys=[world.publisher.public],
                options=SessionOptions(reply_seconds=60.0),
            )
            with session:
                adapter = session.attach(ADAPTER)
                for x in np.random.default_rng(seed).normal(size=(25, 1, d_in)):
                    try:
                        logged.append((x[0], session.begin(adapter, 0, "o", x).wait()[0]))
                    except BudgetExhaustedError:
                        break
        secret = world.delta(0, "o_proj", np.eye(d_in)).T
        u = adapter.basis[0, "o_proj"].astype(np.float64)
    assert len(logged) == budget, "25 in the first session, 15 in the second"
    x, z = (np.array(values) for values in zip(*logged, strict=True))
    found = u @ np.linalg.lstsq(x, z, rcond=None)[0].T
    error = np.linalg.norm(found - secret) / np.linalg.norm(secret)
    # 40 of 48 directions: what is missing is the share of the other 8.
    assert error == pytest.approx(np.sqrt(8 / 48), rel=0.4)
