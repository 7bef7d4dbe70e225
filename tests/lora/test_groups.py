"""Integer weights: the largest scale within the norm bound, and the worst-case error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks.parameters import PARAMETER_SETS, get_parameter_set
from tensorguard.errors import PrivacyBoundError, UnsupportedAdapterError
from tensorguard.lora.adapter import LoraModule
from tensorguard.lora.groups import (
    ERROR_BOUND,
    build_group,
    build_groups,
    group_keys,
    relative_encryption_error,
    relative_rounding_error,
    round_group,
    round_weights,
    split_group,
)
from tests.lora.test_factorisation import module, product

PARAMETERS = get_parameter_set("n4096-q90-w12")
SETS = [parameters for name, parameters in sorted(PARAMETER_SETS.items()) if parameters.degree == 4096]


def qkv(d_in: int = 64, ranks: tuple[int, ...] = (4, 2, 4)) -> dict[tuple[int, str], LoraModule]:
    names = ("q_proj", "k_proj", "v_proj")
    return {(0, name): module(d_in, 32, rank, seed) for seed, (name, rank) in enumerate(zip(names, ranks, strict=True))}


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
def test_scale_is_the_largest_within_the_bound(rank: int, d_in: int, magnitude: float, seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(rank, d_in)) * 10.0**magnitude
    bound = PARAMETERS.norm_bound(d_in, rank)
    integers, exponent = round_weights(weights, bound)
    assert integers.dtype == np.int32
    assert np.linalg.norm(integers.astype(np.float64)) <= bound
    assert np.linalg.norm(np.rint(np.ldexp(weights, exponent + 1))) > bound
    assert np.abs(integers - np.ldexp(weights, exponent)).max() <= 0.5


def test_scale_counts_what_rounding_brings_within_the_bound() -> None:
    # 1.2 is over the bound 1, but rounds to 1.
    integers, exponent = round_weights(np.array([[1.2]]), 1.0)
    assert (integers.item(), exponent) == (1, 0)


def test_concentrated_weights_fit_int32() -> None:
    weights = np.zeros((128, 14336))
    weights[3, 5] = 1.0
    integers, _ = round_weights(weights, SETS[-1].norm_bound(14336, 128))
    assert integers.max() > 2**25


def test_zero_weights_have_scale_one() -> None:
    integers, exponent = round_weights(np.zeros((2, 3)), 100.0)
    assert not integers.any()
    assert exponent == 0
    assert relative_rounding_error(np.zeros((2, 3)), integers, exponent) == 0.0


def test_weights_without_a_usable_scale_are_refused() -> None:
    with pytest.raises(UnsupportedAdapterError, match="no usable scale"):
        round_weights(np.full((1, 1), 1e-155), 100.0)


def test_error_is_attained_by_the_worst_input_and_by_no_other() -> None:
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(4, 30))
    integers, exponent = round_weights(weights, PARAMETERS.norm_bound(30, 4))
    error = weights - integers * 2.0**-exponent
    unit = np.linalg.norm(weights) / np.sqrt(30)
    worst = np.linalg.svd(error)[2][0]
    bound = relative_rounding_error(weights, integers, exponent)
    assert np.linalg.norm(error @ worst) / unit == pytest.approx(bound)
    for x in generator.normal(size=(200, 30)):
        assert np.linalg.norm(error @ x) / (np.linalg.norm(x) * unit) <= bound


def test_group_stacks_projections_in_order() -> None:
    modules = qkv()
    group = build_group(0, "qkv", modules, PARAMETERS)
    assert [(info.name, info.rank, info.row_offset) for info in group.projections] == [
        ("q_proj", 4, 0),
        ("k_proj", 2, 4),
        ("v_proj", 4, 6),
    ]
    assert group.integers.shape == (10, 64) == (group.rows, group.d_in)
    assert group.norm_bound == 2**12 * np.sqrt(64 * 4)
    for info in group.projections:
        rows = group.integers[info.row_offset : info.row_offset + info.rank] * 2.0**-info.scale_exponent
        expected = product(modules[0, info.name])
        found = group.u[info.name].astype(np.float64) @ rows
        # The error bound of the protocol, for every x: |U E| = |E| as U is orthonormal.
        assert np.linalg.norm(found - expected, 2) <= ERROR_BOUND * np.linalg.norm(expected) / np.sqrt(64)


def test_partial_groups() -> None:
    modules = qkv()
    del modules[0, "k_proj"]
    assert [info.name for info in build_group(0, "qkv", modules, PARAMETERS).projections] == [
        "q_proj",
        "v_proj",
    ]
    assert group_keys(modules | {(3, "down_proj"): module(8, 8, 1)}) == [(0, "qkv"), (3, "down")]


def test_projections_of_a_group_share_their_input() -> None:
    modules = qkv()
    modules[0, "k_proj"] = module(65, 32, 2)
    with pytest.raises(UnsupportedAdapterError, match="layer 0"):
        build_group(0, "qkv", modules, PARAMETERS)
    with pytest.raises(UnsupportedAdapterError):
        build_group(0, "down", modules, PARAMETERS)


def test_weight_bits_rise_until_the_error_bound_holds() -> None:
    # One row of 2048 channels: 12 bits err by about 1.3 times the bound.
    modules = {(0, "down_proj"): module(2048, 32, 1), (0, "o_proj"): module(64, 64, 4)}
    with pytest.raises(PrivacyBoundError, match="more weight bits"):
        build_group(0, "down", modules, SETS[0])
    steps = []
    chosen, groups = build_groups(modules, SETS, lambda done, total: steps.append((done, total)))
    assert chosen.name in ("n4096-q90-w13", "n4096-q90-w14")
    assert max(group.error for group in groups) <= ERROR_BOUND
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_packing_refuses_when_no_set_is_exact_enough() -> None:
    modules = {(0, "down_proj"): module(2048, 32, 1)}
    with pytest.raises(PrivacyBoundError, match=r"layer 0 down under n4096-q90-w12 can err by \d"):
        build_groups(modules, SETS[:1])


def test_encryption_counts_in_the_bound() -> None:
    """A small rank beside a large one has less of the ring's room, so encryption errs more there."""
    alone = round_group(0, "o", split_group(0, "o", {(0, "o_proj"): module(4096, 64, 4)}), SETS[2])
    beside = {(0, "gate_proj"): module(4096, 64, 4), (0, "up_proj"): module(4096, 128, 128, 1)}
    group = round_group(0, "gate_up", split_group(0, "gate_up", beside), SETS[2])
    small = relative_encryption_error(group.integers[:4], SETS[2].noise(group.norm_bound))
    large = relative_encryption_error(alone.integers, SETS[2].noise(alone.norm_bound))
    # sqrt(128 / 4), up to how full the scales of the two are.
    assert 2.5 < small / large < 12
    assert group.error >= small


def test_modules_that_change_nothing_are_allowed() -> None:
    modules = qkv()
    modules[0, "k_proj"].B[:] = 0
    group = build_group(0, "qkv", modules, PARAMETERS)
    info = group.projections[1]
    assert info.scale_exponent == 0
    assert not group.integers[info.row_offset : info.row_offset + info.rank].any()
    assert group.error <= ERROR_BOUND


def test_random_inputs_err_far_less_than_the_worst_one() -> None:
    lora = module(576, 576, 16)
    group = build_group(0, "o", {(0, "o_proj"): lora}, PARAMETERS)
    a = group.u["o_proj"].astype(np.float64).T @ product(lora)
    rows = group.integers * 2.0 ** -group.projections[0].scale_exponent
    x = np.random.default_rng(5).normal(size=(576, 500))
    errors = np.linalg.norm((rows - a) @ x, axis=0) / np.linalg.norm(x, axis=0)
    assert errors.max() <= 2.0**-12 * np.linalg.norm(a) / np.sqrt(576)


def test_full_mode_stacks_whole_products() -> None:
    modules = qkv(ranks=(4, 2, 4))
    group = build_group(0, "qkv", modules, PARAMETERS, mode="full")
    assert [(info.name, info.rank, info.d_out, info.row_offset) for info in group.projections] == [
        ("q_proj", 32, 32, 0),
        ("k_proj", 32, 32, 32),
        ("v_proj", 32, 32, 64),
    ]
    assert not group.u and group.norm_bound == PARAMETERS.norm_bound(64, 16)
    for info in group.projections:
        rows = group.integers[info.row_offset : info.row_offset + info.rank] * 2.0**-info.scale_exponent
        expected = product(modules[0, info.name])
        assert np.linalg.norm(rows - expected, 2) <= ERROR_BOUND * np.linalg.norm(expected) / np.sqrt(64)


def test_full_mode_keeps_a_long_row_within_the_groups_bound() -> None:
    long = module(64, 200, 2)
    long.B[7] *= 1000.0
    group = build_group(0, "o", {(0, "o_proj"): long}, SETS[-1], mode="full")
    norms = np.linalg.norm(group.integers.astype(np.float64), axis=1)
    assert norms.max() == norms[7] and group.norm_bound / 2 < norms[7] <= group.norm_bound
    (info,) = group.projections
    # Without the bound on rows the scale would be larger: the Frobenius norm leaves room.
    _, free = round_weights(product(long), SETS[-1].norm_bound(64, 200))
    assert info.scale_exponent < free
