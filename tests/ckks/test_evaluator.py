from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import EncodedGroup, Evaluator, GroupWeights, Plan, get_parameter_set
from tensorguard.ckks.plan import MAX_ROWS, TOKEN_COUNTS
from tensorguard.errors import InvalidInputError, NotFoundError, TenSafeError
from tests.ckks import reference, stepwise
from tests.ckks.conftest import RINGS, SESSION, Pair, make_weights

PARAMETERS = get_parameter_set("n4096-q90-w12")


class RecordingEvaluator(Evaluator):
    """Remembers the randomness of its last call."""

    def _randomness(self, responses: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.drawn = copied(super()._randomness(responses, outputs))
        return self.drawn


def copied(drawn: tuple) -> tuple:
    """Its arrays are used again by the next call."""
    return tuple(array.copy() for array in drawn)


def evaluate_by_reference(
    pair: Pair, weights: GroupWeights, plan: Plan, tokens: int, sent: object, drawn: tuple
) -> tuple[np.ndarray, np.ndarray]:
    parameters = pair.parameters
    primes, q, degree = parameters.primes, parameters.modulus, parameters.degree
    trits, error_words, flood_words = drawn
    blocks, groups = plan.blocks(weights.d_in), plan.row_groups(weights.rows)

    def coefficients(values: np.ndarray) -> list[int]:
        return reference.combine(
            np.stack([reference.inverse(values[i].astype(np.uint64), p) for i, p in enumerate(primes)]), primes
        )

    seed = pair.seed
    inputs = []
    for index, identifier in enumerate(sent.ids.tolist()):
        own = sent.seeds[32 * index : 32 * index + 32]
        a = reference.expand(parameters, reference.CIPHERTEXT, SESSION, identifier, own)
        inputs.append((coefficients(sent.b[index]), coefficients(a)))
    pk0 = coefficients(pair.host.public_key)
    pk1 = coefficients(reference.expand(parameters, reference.PUBLIC_KEY, SESSION, 0, seed))
    c1 = np.empty((plan.downloads(tokens, weights.rows), degree), np.uint32)
    c0 = np.empty((tokens, weights.rows), np.uint32)
    for response in range(len(c1)):
        chunk, group = divmod(response, groups)
        u = [int(t) - 1 for t in trits[response]]
        totals = [reference.negacyclic(key, u, q) for key in (pk0, pk1)]
        for block in range(blocks):
            weight = reference.encode_weights(weights.integers, plan, group, block, degree)
            for half in range(2):
                product = reference.negacyclic(inputs[chunk * blocks + block][half], weight, q)
                totals[half] = [x + y for x, y in zip(totals[half], product, strict=True)]
        noisy = [(x + e) % q for x, e in zip(totals[1], reference.errors(error_words[response], degree), strict=True)]
        c1[response] = [reference.switch(value, primes) for value in noisy]
        for t in range(min(plan.tokens, tokens - chunk * plan.tokens)):
            for j in range(min(plan.rows, weights.rows - group * plan.rows)):
                token, row = chunk * plan.tokens + t, group * plan.rows + j
                flood = reference.flood(flood_words[token * weights.rows + row], parameters.flood_bits)
                value = (totals[0][reference.wanted(plan, t, j)] + flood) % q
                c0[token, row] = reference.switch(value, primes)
    return c1, c0


@st.composite
def shapes(draw: st.DrawFn, degree: int) -> tuple[Plan, int, int, int]:
    """Any plan of this ring, for at most one chunk, row group or block more than one: plan, tokens, rows, channels."""
    tokens = draw(st.sampled_from(TOKEN_COUNTS))
    rows = draw(st.integers(1, 128 // tokens))
    widest = degree // (tokens * rows)
    plan = Plan(tokens, draw(st.integers(1, widest) | st.just(widest)), rows)
    sizes = [draw(st.integers(1, size)) for size in plan.shape]
    beyond = draw(st.integers(0, 2))
    sizes[beyond] += plan.shape[beyond]
    return plan, sizes[0], sizes[2], sizes[1]


@pytest.mark.parametrize("name", RINGS)
@settings(max_examples=2, deadline=None)
@given(st.data())
def test_evaluation_is_the_reference_bit_for_bit(name: str, data: st.DataObject) -> None:
    parameters = get_parameter_set(name)
    plan, tokens, rows, d_in = data.draw(shapes(parameters.degree))
    seed = data.draw(st.integers(0, 2**32 - 1))
    pair = Pair.create(parameters, RecordingEvaluator)
    weights = make_weights(rows, d_in, parameters, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, d_in))
    sent = pair.host.encrypt(x, plan, weights.norm_bound)
    group = EncodedGroup(weights, parameters, [plan])
    response = pair.evaluator.evaluate(group, plan, tokens, sent.ids, sent.seeds, sent.b)
    c1, c0 = evaluate_by_reference(pair, weights, plan, tokens, sent, pair.evaluator.drawn)
    np.testing.assert_array_equal(response.c1, c1)
    np.testing.assert_array_equal(response.c0, c0)


class RepeatingEvaluator(Evaluator):
    """Uses the same randomness for every call, so that calls can be compared."""

    def _randomness(self, responses: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not hasattr(self, "drawn"):
            self.drawn = copied(super()._randomness(responses, outputs))
        return self.drawn


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize(("tokens", "plan"), [(1, Plan(1, 128, 8)), (37, Plan(16, 64, 4))])
def test_threads_change_nothing(name: str, tokens: int, plan: Plan) -> None:
    """Bit for bit, with more threads than there is work for some steps."""
    parameters = get_parameter_set(name)
    pair = Pair.create(parameters, RepeatingEvaluator)
    weights = make_weights(20, 300, parameters)
    sent = pair.host.encrypt(np.random.default_rng(0).normal(size=(tokens, 300)), plan, weights.norm_bound)
    group = EncodedGroup(weights, parameters, [plan])
    answers = []
    for threads in (1, 2, 3, 7):
        pair.evaluator._threads = threads
        pair.evaluator._admission._last_ids = {}
        answers.append(pair.evaluator.evaluate(group, plan, tokens, sent.ids, sent.seeds, sent.b))
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.c1, answers[0].c1)
        np.testing.assert_array_equal(answer.c0, answers[0].c0)


def test_numbers_of_threads_are_checked(pair: Pair) -> None:
    for threads in (0, 65):
        with pytest.raises(InvalidInputError, match="threads"):
            Evaluator(PARAMETERS, pair.host.public_key, pair.seed, SESSION, threads=threads)


class HistoryEvaluator(Evaluator):
    """Remembers the randomness of every call and of every element of the pool."""

    history: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def _randomness(self, responses: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        drawn = copied(super()._randomness(responses, outputs))
        self.history = [*getattr(self, "history", []), drawn]
        return drawn


@pytest.mark.parametrize(("name", "ready"), [(RINGS[0], 1), (RINGS[0], 5), (RINGS[1], 3)])
def test_evaluation_from_the_pool_is_the_reference_bit_for_bit(name: str, ready: int) -> None:
    """Responses re-randomised in line come first, then the pooled ones: 3, 0 or 1 of 4 in line."""
    parameters = get_parameter_set(name)
    plan, tokens = Plan.parse("t2.c16.r4"), 3
    pair = Pair.create(parameters, HistoryEvaluator, pool_bytes=4 << 20)
    weights = make_weights(5, 16, parameters)
    sent = pair.host.encrypt(np.random.default_rng(0).normal(size=(tokens, 16)), plan, weights.norm_bound)
    group = EncodedGroup(weights, parameters, [plan])
    for _ in range(ready):
        pair.evaluator.pool.fill()
    elements = list(pair.evaluator.pool._ready)
    response = pair.evaluator.evaluate(group, plan, tokens, sent.ids, sent.seeds, sent.b)
    *made, (trits, error_words, flood_words) = pair.evaluator.history
    pooled = min(ready, len(response.c1))
    assert len(trits) == len(error_words) == len(response.c1) - pooled
    drawn = (
        np.concatenate([trits, *(one[0] for one in made[:pooled])]),
        np.concatenate([error_words, *(one[1] for one in made[:pooled])]),
        flood_words,
    )
    c1, c0 = evaluate_by_reference(pair, weights, plan, tokens, sent, drawn)
    np.testing.assert_array_equal(response.c1, c1)
    np.testing.assert_array_equal(response.c0, c0)
    assert [element.values.any() for element in elements] == [False] * pooled + [True] * (ready - pooled)
    counters = pair.evaluator.counters
    assert counters.rerandomisations == 4 and counters.transforms == len(parameters.primes) * (3 * 4 - pooled)
    pair.evaluator.pool.close()
    assert not any(element.values.any() for element in elements)


def test_more_blocks_than_one_sum_holds(pair: Pair) -> None:
    """Largest weights and 40 blocks: the 64-bit sums are reduced in time."""
    integers = np.full((1, 40), 2**16, np.int32)
    weights = GroupWeights(integers, (0,), 2.0**19)
    x = np.random.default_rng(0).normal(size=(1, 40))
    z = pair.product(x, weights, Plan(1, 1, 1))
    np.testing.assert_allclose(z, x @ integers.T.astype(float), atol=2**16 * 1e-4)


@pytest.fixture
def request_parts(pair: Pair) -> dict:
    plan = Plan(2, 64, 4)
    weights = make_weights(8, 128, PARAMETERS)
    sent = pair.host.encrypt(np.ones((3, 128)), plan, weights.norm_bound)
    return {
        "group": EncodedGroup(weights, PARAMETERS, [plan]),
        "plan": plan,
        "tokens": 3,
        "ids": sent.ids,
        "seeds": sent.seeds,
        "b": sent.b,
    }


@pytest.mark.parametrize("prime", [0, 1, 2])
def test_residues_at_or_above_the_prime_are_refused(pair: Pair, request_parts: dict, prime: int) -> None:
    for value in (PARAMETERS.primes[prime], 2**32 - 1):
        b = request_parts["b"].copy()
        b[-1, prime, -1] = value
        with pytest.raises(InvalidInputError, match="below its prime"):
            pair.evaluator.evaluate(**{**request_parts, "b": b})
    b[-1, prime, -1] = PARAMETERS.primes[prime] - 1
    pair.evaluator.evaluate(**{**request_parts, "b": b})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("b", lambda b: b[:-1]),
        ("b", lambda b: b[:, :2]),
        ("b", lambda b: b[..., :-1]),
        ("b", lambda b: b.astype(np.int64)),
        ("ids", lambda ids: ids[:-1]),
        ("ids", lambda ids: ids.astype(np.int64)),
        ("seeds", lambda seeds: seeds[:-1]),
        ("seeds", lambda seeds: seeds + b"\0"),
        ("tokens", lambda tokens: 0),
        ("tokens", lambda tokens: -3),
        ("tokens", lambda tokens: tokens + 2),
        ("tokens", lambda tokens: 1 << 40),
    ],
)
def test_shapes_types_and_counts_are_checked(pair: Pair, request_parts: dict, field: str, change: object) -> None:
    with pytest.raises(InvalidInputError):
        pair.evaluator.evaluate(**{**request_parts, field: change(request_parts[field])})


def test_a_plan_that_was_not_compiled_is_refused(pair: Pair, request_parts: dict) -> None:
    with pytest.raises(NotFoundError):
        pair.evaluator.evaluate(**{**request_parts, "plan": Plan(2, 32, 4)})


def test_a_plan_larger_than_the_ring_is_refused(pair: Pair) -> None:
    with pytest.raises(InvalidInputError, match="exceeds the ring degree 4096"):
        EncodedGroup(make_weights(8, 1000, PARAMETERS), PARAMETERS, [Plan(1, 1000, 8)])
    with pytest.raises(InvalidInputError, match="exceeds the ring degree 4096"):
        pair.host.encrypt(np.ones((1, 1000)), Plan(1, 1000, 8), 4096.0)


def test_repeated_and_old_identifiers_are_refused(pair: Pair, request_parts: dict) -> None:
    doubled = request_parts["ids"].copy()
    doubled[1] = doubled[0]
    with pytest.raises(InvalidInputError, match="before"):
        pair.evaluator.evaluate(**{**request_parts, "ids": doubled})
    pair.evaluator.evaluate(**request_parts)
    with pytest.raises(InvalidInputError, match="before"):
        pair.evaluator.evaluate(**request_parts)
    # Another worker's numbers are its own.
    pair.evaluator.evaluate(**{**request_parts, "ids": request_parts["ids"] + np.uint64(1 << 48)})


def test_a_refused_request_uses_up_no_identifier(pair: Pair, request_parts: dict) -> None:
    broken = request_parts["b"].copy()
    broken[0, 0, 0] = 2**31
    with pytest.raises(InvalidInputError):
        pair.evaluator.evaluate(**{**request_parts, "b": broken})
    pair.evaluator.evaluate(**request_parts)


def test_a_bad_public_key_is_refused(pair: Pair) -> None:
    for damage in (lambda k: k[:2], lambda k: k.astype(np.uint64), lambda k: k | np.uint32(1 << 31)):
        with pytest.raises(InvalidInputError):
            Evaluator(PARAMETERS, damage(pair.host.public_key), bytes(32), SESSION)
    with pytest.raises(InvalidInputError):
        Evaluator(PARAMETERS, pair.host.public_key, bytes(31), SESSION)


def test_weights_for_other_parameters_are_refused(pair: Pair, request_parts: dict) -> None:
    other = get_parameter_set("n4096-q90-w13")
    group = EncodedGroup(make_weights(8, 128, other), other, [request_parts["plan"]])
    with pytest.raises(InvalidInputError):
        pair.evaluator.evaluate(**{**request_parts, "group": group})


def test_operations_are_counted_and_none_is_a_rotation(parameters: object) -> None:
    pair = Pair.create(parameters)
    weights = make_weights(8, 128, PARAMETERS)
    pair.product(np.ones((3, 128)), weights, Plan(2, 64, 4))
    counters = pair.evaluator.counters
    assert (counters.products, counters.rerandomisations, counters.modulus_switches) == (8, 4, 4)
    assert counters.transforms == 36
    assert counters.rotations == 0
    public = {name for name in dir(Evaluator) if not name.startswith("_")}
    assert public == {"evaluate", "close"}, "the evaluator offers no other operation on ciphertexts"


@pytest.mark.parametrize(
    ("integers", "exponents", "bound"),
    [
        (np.ones((2, 4), np.int64), (0, 0), 100.0),
        (np.ones(4, np.int32), (0,), 100.0),
        (np.ones((0, 4), np.int32), (), 100.0),
        (np.ones((2, 4), np.int32), (0,), 100.0),
        (np.ones((2, 4), np.int32), (0, 0), 1.9),
        (np.ones((2, 4), np.int32), (0, 0), float("nan")),
        (np.ones((MAX_ROWS + 1, 1), np.int32), (0,) * (MAX_ROWS + 1), 100.0),
    ],
)
def test_weights_are_checked(integers: np.ndarray, exponents: tuple[int, ...], bound: float) -> None:
    with pytest.raises(TenSafeError):
        GroupWeights(integers, exponents, bound)


@pytest.mark.parametrize("pooled", [0, 1, 9])
def test_the_steps_make_the_same_answer(pooled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the attack tests look into is what the product computes: `kernels.evaluate`, bit for bit."""
    pair = Pair.create(PARAMETERS, pool_bytes=1 << 20)
    plan, weights = Plan(2, 100, 3), make_weights(7, 250, PARAMETERS)
    group = EncodedGroup(weights, PARAMETERS, [plan])
    sent = pair.host.encrypt(np.random.default_rng(0).normal(size=(5, 250)), plan, weights.norm_bound)
    for _ in range(pooled):
        pair.evaluator.pool.fill()
    ready = pair.evaluator.pool.take(pooled)
    drawn = copied(pair.evaluator._randomness(9 - pooled, 5 * 7))
    answers = []
    for step_by_step in (False, True):
        if step_by_step:
            stepwise.install(monkeypatch)
        copies = [type(element)(element.values.copy()) for element in ready]
        monkeypatch.setattr(pair.evaluator.pool, "take", lambda _, copies=copies: copies)
        monkeypatch.setattr(pair.evaluator, "_randomness", lambda *_: drawn)
        answers.append(pair.evaluator._evaluate(group, group.encoded(plan), plan, 5, sent.ids, sent.seeds, sent.b))
        assert all((element.values == 0).all() for element in copies)
    np.testing.assert_array_equal(answers[0].c1, answers[1].c1)
    np.testing.assert_array_equal(answers[0].c0, answers[1].c0)
