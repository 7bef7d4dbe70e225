"""The planner's choices against searches that leave nothing out, under its own cost model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import PARAMETER_SETS, EncodedGroup, GroupWeights, ParameterSet, Plan, get_parameter_set
from tensorguard.ckks.plan import MAX_OUTPUTS, MAX_ROWS, TOKEN_COUNTS
from tensorguard.ckks.planner import (
    GOOD_ENOUGH,
    MAX_CHUNK_BYTES,
    Costs,
    call_cost,
    candidate_plans,
    compile_plans,
    default_memory_limit,
    rank_plans,
    select_plan,
    share_memory,
)
from tensorguard.errors import InvalidInputError
from tensorguard.session import frames

PARAMETERS = get_parameter_set("n4096-q90-w12")
GIB = 1 << 30
LLAMA_3_8B = [(4096, 48), (4096, 16)] * 32
"""(d_in, rows) of q,k,v and o at rank 16."""

shapes = st.tuples(
    st.one_of(st.integers(1, 300), st.integers(1, 14336)), st.one_of(st.integers(1, 64), st.integers(1, 700))
)
costs = st.builds(
    Costs,
    transform=st.floats(0, 20),
    upload=st.floats(0, 300),
    response=st.floats(0, 300),
    product=st.floats(0, 20),
    link_byte=st.floats(0, 0.01),
    call=st.floats(0, 500),
)


def every_plan(d_in: int, rows: int) -> Iterator[Plan]:
    """All that fit the ring and a frame, but for those with more channels than are good for anything."""
    for tokens in TOKEN_COUNTS:
        for plan_rows in range(1, min(rows, MAX_OUTPUTS // tokens) + 1):
            widest = PARAMETERS.degree // (tokens * plan_rows)
            for channels in range(1, min(widest, 1 << d_in.bit_length()) + 1):
                plan = Plan(tokens, channels, plan_rows)
                if plan.chunk_bytes(PARAMETERS, d_in, rows) <= MAX_CHUNK_BYTES:
                    yield plan


@settings(max_examples=6, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 24)),
    st.integers(1, 100),
    st.one_of(st.none(), st.floats(0.0, 1.0)),
    costs,
)
def test_the_search_finds_the_cheapest_plan_of_all(
    shape: tuple[int, int], tokens: int, tightness: float | None, prices: Costs
) -> None:
    everything = [call_cost(plan, PARAMETERS, tokens, *shape, prices) for plan in every_plan(*shape)]
    limit = None
    if tightness is not None:
        sizes = sorted({cost.memory_bytes for cost in everything})
        limit = sizes[int(tightness * (len(sizes) - 1))]
    found = rank_plans(PARAMETERS, tokens, *shape, limit, prices)[0]
    best = min(cost.microseconds for cost in everything if limit is None or cost.memory_bytes <= limit)
    assert found.microseconds <= best * (1 + 1e-9)
    assert limit is None or found.memory_bytes <= limit


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_packed_plans_are_close_to_the_best_and_within_the_memory(shape: tuple[int, int]) -> None:
    packed = compile_plans(PARAMETERS, *shape)
    assert sum(plan.weight_bytes(PARAMETERS, *shape) for plan in packed) <= default_memory_limit(PARAMETERS, *shape)
    for tokens in TOKEN_COUNTS:
        chosen = select_plan(packed, PARAMETERS, tokens, *shape)
        best = rank_plans(PARAMETERS, tokens, *shape)[0]
        ratio = call_cost(chosen, PARAMETERS, tokens, *shape).microseconds / best.microseconds
        assert ratio <= GOOD_ENOUGH or shape[0] * shape[1] > 600_000


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda parameters: parameters.name)
@pytest.mark.parametrize("shape", [(576, 48), (4096, 48), (4096, 16), (14336, 16), (8192, 48)])
def test_common_shapes_are_within_1_15_of_the_best(parameters: ParameterSet, shape: tuple[int, int]) -> None:
    packed = compile_plans(parameters, *shape)
    for tokens in (1, 2, 3, 5, 8, 13, 33, 64, 200):
        chosen = select_plan(packed, parameters, tokens, *shape)
        best = rank_plans(parameters, tokens, *shape)[0]
        time = call_cost(chosen, parameters, tokens, *shape).microseconds
        assert time <= 1.15 * best.microseconds, (tokens, chosen.identifier, best.plan.identifier)


@settings(max_examples=15, deadline=None)
@given(shapes, st.floats(1.0, 8.0))
def test_a_memory_limit_is_kept_by_leaving_plans_out(shape: tuple[int, int], factor: float) -> None:
    limit = int(_least(shape) * factor)
    packed = compile_plans(PARAMETERS, *shape, memory_limit=limit)
    assert packed and sum(plan.weight_bytes(PARAMETERS, *shape) for plan in packed) <= limit


def _least(shape: tuple[int, int]) -> int:
    return min(cost.memory_bytes for cost in rank_plans(PARAMETERS, 1, *shape, 1 << 62))


def test_too_little_memory_is_refused_with_the_least_that_would_do() -> None:
    least = _least((4096, 48))
    for call in (
        lambda limit: compile_plans(PARAMETERS, 4096, 48, memory_limit=limit),
        lambda limit: rank_plans(PARAMETERS, 1, 4096, 48, limit),
    ):
        assert call(least)
        with pytest.raises(InvalidInputError, match=f"at least {least} bytes"):
            call(least - 1)
    shapes = [(4096, 48), (4096, 16)]
    needed = sum(map(_least, shapes))
    assert share_memory(PARAMETERS, shapes, needed) == [*map(_least, shapes)]
    with pytest.raises(InvalidInputError, match=f"at least {needed} bytes"):
        share_memory(PARAMETERS, shapes, needed - 1)


def test_an_adapter_of_llama_3_8b_shape_fits_in_a_gibibyte() -> None:
    packed = {shape: compile_plans(PARAMETERS, *shape) for shape in LLAMA_3_8B}
    assert sum(plan.weight_bytes(PARAMETERS, *shape) for shape in LLAMA_3_8B for plan in packed[shape]) <= GIB
    # One layer of it, encoded: the numbers above are the arrays'.
    generator = np.random.default_rng(0)
    layer = 0
    for d_in, rows in ((4096, 48), (4096, 16)):
        bound = PARAMETERS.norm_bound(d_in, 16)
        integers = generator.integers(-1000, 1000, (rows, d_in), dtype=np.int32)
        layer += EncodedGroup(GroupWeights(integers, (0,) * rows, bound), PARAMETERS, packed[d_in, rows]).nbytes
    assert 32 * layer <= GIB
    assert layer == sum(p.weight_bytes(PARAMETERS, *shape) for shape in LLAMA_3_8B[:2] for p in packed[shape])


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda parameters: parameters.name)
def test_a_gibibyte_can_be_asked_for_under_any_parameter_set(parameters: ParameterSet) -> None:
    limits = share_memory(parameters, LLAMA_3_8B, GIB)
    packed = [compile_plans(parameters, *s, memory_limit=m) for s, m in zip(LLAMA_3_8B, limits, strict=True)]
    used = sum(p.weight_bytes(parameters, *s) for s, plans in zip(LLAMA_3_8B, packed, strict=True) for p in plans)
    assert used <= GIB
    assert min(len(plans) for plans in packed) >= 2


@pytest.mark.parametrize("shape", [(4096, 6144), (4096, 28672), (14336, 4096), (1 << 17, 512), (512, MAX_ROWS)])
def test_the_largest_matrices_have_plans_whose_calls_fit_frames(shape: tuple[int, int]) -> None:
    assert MAX_CHUNK_BYTES + 64 * 1024 <= frames.MAX_FRAME_BYTES
    assert compile_plans(PARAMETERS, *shape)
    for plan in candidate_plans(PARAMETERS, *shape):
        # As in frames.py: residues in four bytes, identifiers, seeds; c1 and c0.
        assert plan.blocks(shape[0]) * (3 * 4 * 4096 + 40) + 128 <= frames.MAX_FRAME_BYTES
        assert plan.row_groups(shape[1]) * 4 * 4096 + 4 * plan.tokens * shape[1] + 128 <= frames.MAX_FRAME_BYTES
        assert max(plan.blocks(shape[0]), plan.row_groups(shape[1])) <= frames.MAX_CIPHERTEXTS


def test_decode_shares_a_polynomial_between_rows_and_prefill_between_tokens() -> None:
    packed = compile_plans(PARAMETERS, 576, 48)
    assert select_plan(packed, PARAMETERS, 1, 576, 48).rows > 1
    assert select_plan(packed, PARAMETERS, 256, 576, 48).tokens >= 16


def test_costs_decide() -> None:
    cheap = Costs(transform=0.0, upload=1.0, response=1.0, product=0.0, link_byte=0.0, call=0.0)
    few_up = rank_plans(PARAMETERS, 1, 4096, 48, None, replace(cheap, upload=1e6))[0]
    few_down = rank_plans(PARAMETERS, 1, 4096, 48, None, replace(cheap, response=1e6))[0]
    assert (few_up.uploads, few_down.downloads) == (1, 1)
    near, far = (rank_plans(PARAMETERS, 1, 4096, 48, None, replace(cheap, link_byte=byte))[0] for byte in (0.0, 1.0))
    assert far.bytes_up + far.bytes_down < near.bytes_up + near.bytes_down


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        select_plan([], PARAMETERS, 1, 576, 48)
    with pytest.raises(InvalidInputError):
        select_plan([Plan(1, 1, 1)], PARAMETERS, 0, 576, 48)
    with pytest.raises(InvalidInputError):
        rank_plans(PARAMETERS, 0, 576, 48)
    for d_in, rows in ((0, 48), (576, 0), (576, MAX_ROWS + 1), ((1 << 17) + 1, 48), (1 << 17, MAX_ROWS)):
        with pytest.raises(InvalidInputError):
            compile_plans(PARAMETERS, d_in, rows)
    for counts in ((), (0,)):
        with pytest.raises(InvalidInputError):
            compile_plans(PARAMETERS, 576, 48, counts)
