from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import EncodedGroup, GroupWeights, Plan, get_parameter_set
from tensorguard.ckks.plan import TOKEN_COUNTS
from tensorguard.errors import InvalidInputError
from tests.ckks import reference
from tests.ckks.conftest import RINGS

PARAMETERS = get_parameter_set("n4096-q90-w12")


@st.composite
def plans(draw: st.DrawFn, degree: int = 8192) -> Plan:
    tokens = draw(st.sampled_from(TOKEN_COUNTS))
    rows = draw(st.integers(1, 128 // tokens))
    return Plan(tokens, draw(st.integers(1, degree // (tokens * rows))), rows)


@pytest.mark.parametrize(
    ("tokens", "channels", "rows"),
    [
        (8, 129, 8),
        (1, 8193, 1),
        (64, 1, 3),
        (1, 1, 129),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 0),
        (-8, 8, -8),
        (3, 4, 4),
        (128, 1, 1),
    ],
)
def test_plans_outside_the_bounds_are_refused(tokens: int, channels: int, rows: int) -> None:
    with pytest.raises(InvalidInputError):
        Plan(tokens, channels, rows)


@pytest.mark.parametrize(
    "text", ["", "t8.c64", "t8.c64.r8 ", "t08.c64.r8", "t8.c64.r8\n", "t8.c99999.r8", "t٣.c1.r1", "t1.c-4.r1"]
)
def test_malformed_identifiers_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Plan.parse(text)


@given(plans())
def test_identifiers_round_trip(plan: Plan) -> None:
    assert Plan.parse(plan.identifier) == plan


@given(plans(), st.sampled_from(RINGS))
def test_a_plan_larger_than_the_ring_is_refused(plan: Plan, name: str) -> None:
    parameters = get_parameter_set(name)
    if plan.tokens * plan.channels * plan.rows <= parameters.degree:
        plan.check(parameters)
    else:
        with pytest.raises(InvalidInputError, match=f"exceeds the ring degree {parameters.degree}"):
            plan.check(parameters)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4096, 8192]).flatmap(lambda n: st.tuples(st.just(n), plans(n))), st.integers(0, 2**32 - 1))
def test_wanted_coefficients_are_exactly_the_inner_products(drawn: tuple[int, Plan], seed: int) -> None:
    """Nothing else lands on them, wrap-around included: full blocks of full range, over the integers."""
    degree, plan = drawn
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**30), 2**30, (plan.tokens, plan.channels))
    weights = rng.integers(-(2**16), 2**16, (plan.rows, plan.channels))
    modulus = 1 << 90
    product = reference.negacyclic(
        reference.encode_activations(x, plan, 0, 0, degree),
        reference.encode_weights(weights, plan, 0, 0, degree),
        modulus,
    )
    for token in range(plan.tokens):
        for row in range(plan.rows):
            expected = sum(int(a) * int(b) for a, b in zip(x[token], weights[row], strict=True))
            assert reference.centre(product[reference.wanted(plan, token, row)], modulus) == expected


def test_weights_are_not_encoded_for_a_plan_larger_than_the_ring() -> None:
    weights = GroupWeights(np.ones((1, 1), np.int32), (0,), 1.0)
    with pytest.raises(InvalidInputError, match="exceeds the ring degree 4096"):
        EncodedGroup(weights, PARAMETERS, [Plan(1, 4097, 1)])


def test_the_stage_that_joins_two_halves_is_never_pruned() -> None:
    assert Plan(1, 8192, 1).skip == (0, 12)
    assert Plan(64, 128, 1).skip == (6, 6)
    assert Plan(1, 4096, 1).skip == (0, 12)
    assert Plan(2, 96, 8).skip == (1, 5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(RINGS), plans(4096), st.integers(1, 300), st.integers(1, 40))
def test_weight_bytes_are_those_of_the_arrays(name: str, plan: Plan, d_in: int, rows: int) -> None:
    """And a plan given twice is stored once."""
    parameters = get_parameter_set(name)
    weights = GroupWeights(np.ones((rows, d_in), np.int32), (0,) * rows, 1e6)
    group = EncodedGroup(weights, parameters, [plan, plan, Plan(*plan.shape)])
    assert group.nbytes == plan.weight_bytes(parameters, d_in, rows)
    assert group.encoded(plan).dtype == np.uint32
