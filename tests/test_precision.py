"""The arithmetic of benchmarks/precision.py, on synthetic activations."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorguard.ckks import get_parameter_set
from tensorguard.lora.factorisation import FactoredProjection
from tensorguard.lora.groups import split_group

ROOT = Path(__file__).resolve().parent.parent
D_IN = 96


@pytest.fixture(scope="module")
def precision() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("precision_benchmark", ROOT / "benchmarks" / "precision.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def modules(precision: Any) -> dict[Any, Any]:
    generator = np.random.default_rng(1)
    return {(0, name): precision.random_module(48, D_IN, 8, generator) for name in ("q_proj", "v_proj")}


def activations(outlier: float) -> np.ndarray:
    x = np.random.default_rng(2).normal(size=(70, D_IN)).astype(np.float32)
    x[:, 7] *= outlier
    return x


def measured(precision: Any, modules: Any, factored: Any = None, bits: int = 12, outlier: float = 200.0) -> Any:
    engine = precision.Engine(get_parameter_set(f"n4096-q90-w{bits}"))
    factored = factored or split_group(0, "qkv", modules)
    records = precision.measure(engine, 0, "qkv", modules, factored, activations(outlier))
    assert [r.projection for r in records] == ["q_proj", "v_proj"]
    return records[0]


def test_parts_are_where_theory_puts_them(precision: Any, modules: Any) -> None:
    record = measured(precision, modules)
    parameters = get_parameter_set("n4096-q90-w12")
    assert (record.bits, record.tokens, record.d_in, record.rank) == (12, 70, D_IN, 8)
    assert record.outlier > 9
    assert 0 < record.errors["u"].rms < record.errors["u"].largest < 2.0**-18, "float32"
    assert record.errors["weights"].largest <= record.bound < 2.0**-9
    # Of one row relative to its norm bound, docs/protocol.md; half to all of the bound is used.
    row = parameters.noise(1.0) * np.sqrt(8 * D_IN)
    assert row < record.errors["he"].rms < 2.2 * row
    whole = np.hypot(np.hypot(record.errors["he"].rms, record.errors["weights"].rms), record.errors["u"].rms)
    assert record.errors["together"].rms == pytest.approx(whole, rel=0.05)


def test_two_more_bits_quarter_the_rounding_and_leave_the_rest(precision: Any, modules: Any) -> None:
    factored = split_group(0, "qkv", modules)
    # Without an outlier channel, whose eight roundings would decide alone.
    coarse, fine = (measured(precision, modules, factored, bits, outlier=1.0) for bits in (12, 14))
    assert fine.errors["weights"].rms == pytest.approx(coarse.errors["weights"].rms / 4, rel=0.3)
    assert fine.errors["he"].rms == pytest.approx(coarse.errors["he"].rms, rel=0.2)
    assert fine.errors["u"] == coarse.errors["u"]


def test_a_wrong_basis_shows_in_its_part_only(precision: Any, modules: Any) -> None:
    factored = split_group(0, "qkv", modules)
    coarse = factored["q_proj"].u.astype(np.float16).astype(np.float32)
    damaged = {**factored, "q_proj": FactoredProjection(coarse, factored["q_proj"].weights, 8)}
    good, bad = measured(precision, modules, factored), measured(precision, modules, damaged)
    assert bad.errors["u"].rms > 100 * good.errors["u"].rms
    assert bad.errors["weights"] == good.errors["weights"]


def test_the_table_names_what_is_over_a_bound(precision: Any, modules: Any) -> None:
    record = measured(precision, modules)
    text = precision.summary([record])
    assert "he: 1 of 1" in text and "together: 1 of 1" in text
    over = dataclasses.replace(record, errors={**record.errors, "he": precision.Error(2.0**-15, 2.0**-13)})
    assert "he: 1 of 2" in precision.summary([record, over]) and "2^-13.00 (layer 0 q_proj, 12 bits)" in (
        precision.summary([record, over])
    )
