"""Checked mode: honest responses pass, responses changed in one token do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import (
    EncodedGroup,
    EncryptedActivations,
    EvaluatedRows,
    ParameterSet,
    Plan,
    checked,
    get_parameter_set,
)
from tensorguard.ckks.checked import TOLERANCE, add_check_row, fits, response_noise
from tensorguard.errors import InvalidInputError
from tests.ckks.conftest import RINGS, Pair, make_weights

PARAMETERS = get_parameter_set("n4096-q90-w12")
ROWS, CHANNELS = 16, 64
TRIALS = 200


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_check_row_is_the_combination_and_no_longer_than_a_token(
    tokens: int, channels: int, aligned: bool, seed: int
) -> None:
    x = np.random.default_rng(seed).normal(size=(1 if aligned else tokens, channels))
    x = np.repeat(x, tokens, axis=0) if aligned else x
    mantissas = np.rint(x / np.linalg.norm(x, axis=1, keepdims=True) * 2**30).astype(np.int32)
    rows, alpha = add_check_row(mantissas)
    assert rows.dtype == np.int32 and rows.shape == (tokens + 1, channels) and alpha.shape == (tokens,)
    np.testing.assert_array_equal(rows[:-1], mantissas)
    assert np.abs(rows[-1] - alpha @ mantissas.astype(np.float64)).max() <= 0.5 + 1e-6
    assert np.linalg.norm(rows[-1].astype(np.float64)) <= 2**30 + np.sqrt(channels)
    # None is near 0 beside the others.
    assert np.abs(alpha).min() >= np.abs(alpha).max() / 2 > 0


def test_alpha_is_fresh_and_of_both_signs() -> None:
    drawn = np.array([add_check_row(np.zeros((64, 1), np.int32))[1] for _ in range(20)])
    assert len(np.unique(drawn)) == drawn.size
    assert np.abs(np.sign(drawn).mean()) < 6 / drawn.size**0.5
    magnitudes = np.abs(drawn)
    assert 0.5 <= magnitudes.min() < 0.51 and 0.99 < magnitudes.max() < 1.0
    assert np.mean(magnitudes) == pytest.approx(0.75, abs=6 * 0.5 / 12**0.5 / drawn.size**0.5)


def test_the_tolerance_is_eight_deviations_of_the_measured_noise(each_ring: ParameterSet) -> None:
    parameters, plan = each_ring, Plan(1, 64, 48)
    pair = Pair.create(parameters)
    weights = make_weights(48, 64, parameters)
    sent, response, _ = answer(pair, np.ones((64, 64)), weights, plan, check=False)
    z = pair.host.decrypt(sent, response, 48, weights.row_scales)
    steps = (z / weights.row_scales - np.ones((64, 64)) @ weights.integers.T) / (sent.unit * sent.norms[:, None])
    assert np.std(steps) == pytest.approx(response_noise(parameters), rel=0.05)
    limit = TOLERANCE * response_noise(parameters) * 5**0.5
    alpha = np.array([2.0])
    for off, expected in ((limit - 2, True), (limit + 2, False)):
        assert fits(np.array([[1000], [2000 + round(off)]], np.int32), alpha, parameters) is expected
        assert fits(np.array([[1000], [2000 - round(off)]], np.int32), alpha, parameters) is expected


def test_the_protocols_noise() -> None:
    assert response_noise(PARAMETERS) == pytest.approx(17.7, abs=0.1)


def answer(
    pair: Pair, x: np.ndarray, weights: object, plan: Plan, *, check: bool
) -> tuple[EncryptedActivations, EvaluatedRows, EncodedGroup]:
    group = EncodedGroup(weights, pair.parameters, [plan])
    sent = pair.host.encrypt(x, plan, weights.norm_bound, checked=check)
    return sent, pair.evaluator.evaluate(group, plan, sent.tokens, sent.ids, sent.seeds, sent.b), group


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(RINGS),
    st.sampled_from(["t1.c64.r16", "t2.c37.r3", "t8.c16.r4", "t64.c2.r2"]),
    st.integers(1, 9),
    st.sampled_from(["random", "aligned", "zero", "tiny", "one-hot"]),
    st.integers(0, 2**32 - 1),
)
def test_honest_responses_pass_and_the_result_is_that_without_the_check(
    name: str, identifier: str, tokens: int, kind: str, seed: int
) -> None:
    parameters, plan = get_parameter_set(name), Plan.parse(identifier)
    pair, weights = Pair.create(parameters), make_weights(ROWS, CHANNELS, parameters, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, CHANNELS))
    match kind:
        case "aligned":
            x[:] = weights.integers[0]
        case "zero":
            x[0] = 0.0
        case "tiny":
            x *= 1e-100
        case "one-hot":
            x[0] = np.eye(CHANNELS)[3]
    sent, response, _ = answer(pair, x, weights, plan, check=True)
    assert sent.tokens == tokens + 1 and len(sent.ids) == plan.uploads(tokens + 1, CHANNELS)
    z = pair.host.decrypt(sent, response, ROWS, weights.row_scales)
    exact = x @ (weights.integers * weights.row_scales[:, None]).T
    norms = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.where(x.any(axis=1), 0.0, 1.0)[:, None])
    assert z.shape == (tokens, ROWS)
    assert (np.abs(z - exact) <= 8 * parameters.noise(weights.norm_bound) * weights.row_scales * norms).all()


def test_honest_responses_never_fail(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """17,600 check values: at eight deviations one in 10^15 is outside, and none of these even at six."""
    weights, plan = make_weights(44, CHANNELS, PARAMETERS, rank=48), Plan(2, 32, 44)
    group = EncodedGroup(weights, PARAMETERS, [plan])
    monkeypatch.setattr(checked, "TOLERANCE", 6.0)
    for x in np.random.default_rng(4).normal(size=(400, 1, CHANNELS)):
        sent = pair.host.encrypt(x, plan, weights.norm_bound, checked=True)
        response = pair.evaluator.evaluate(group, plan, 2, sent.ids, sent.seeds, sent.b)
        pair.host.decrypt(sent, response, 44, weights.row_scales)
    monkeypatch.setattr(checked, "TOLERANCE", 1.0)
    with pytest.raises(InvalidInputError):
        pair.host.decrypt(sent, response, 44, weights.row_scales)


def detected(pair: Pair, tokens: int, change: str, size: int, *, check: bool, trials: int = TRIALS) -> float:
    """Share of responses that are refused when one value of one token is changed by ±``size`` residues."""
    weights, plan = make_weights(ROWS, CHANNELS, PARAMETERS), Plan(2, 64, 16)
    group = EncodedGroup(weights, PARAMETERS, [plan])
    generator = np.random.default_rng(size + tokens)
    prime = PARAMETERS.primes[0]
    refused = 0
    for _ in range(trials):
        sent = pair.host.encrypt(generator.normal(size=(tokens, CHANNELS)), plan, weights.norm_bound, checked=check)
        response = pair.evaluator.evaluate(group, plan, sent.tokens, sent.ids, sent.seeds, sent.b)
        c1, c0 = response.c1.astype(np.int64), response.c0.astype(np.int64)
        delta = int(generator.choice((-size, size)))
        token, row = generator.integers(tokens), generator.integers(ROWS)
        match change:
            case "c0":
                c0[token, row] += delta
            case "c0, with the check row guessed":
                # The best guess at α is one of its possible values.
                c0[token, row] += delta
                c0[-1, row] += round(delta * generator.uniform(0.5, 1.0) * generator.choice((-1, 1)))
            case "c1":
                c1[generator.integers(len(c1)), generator.integers(c1.shape[1])] += delta
        changed = EvaluatedRows((c1 % prime).astype(np.uint32), (c0 % prime).astype(np.uint32))
        try:
            pair.host.decrypt(sent, changed, ROWS, weights.row_scales)
        except InvalidInputError:
            refused += 1
    return refused / trials


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("change", ["c0", "c0, with the check row guessed", "c1"])
def test_changes_of_one_token_are_found(pair: Pair, tokens: int, change: str) -> None:
    """2^14 is 2^-16 of the range, less than a typical value's size by 2^11 or so."""
    assert detected(pair, tokens, change, 2**14, check=True) >= 0.95


@pytest.mark.parametrize("change", ["c0", "c1"])
def test_without_the_check_they_pass(pair: Pair, change: str) -> None:
    assert detected(pair, 1, change, 2**14, check=False, trials=100) == 0.0


def test_a_refused_response_says_nothing_more(pair: Pair) -> None:
    weights, plan = make_weights(ROWS, CHANNELS, PARAMETERS), Plan(2, 64, 16)
    sent, response, _ = answer(pair, np.ones((1, CHANNELS)), weights, plan, check=True)
    far = response.c0.copy()
    far[0, 0] = (int(far[0, 0]) + PARAMETERS.primes[0] // 2) % PARAMETERS.primes[0]
    near = response.c0.copy()
    near[0, 0] = (int(near[0, 0]) + 5000) % PARAMETERS.primes[0]
    messages = set()
    for c0 in (far, near, response.c0[:1]):
        with pytest.raises(InvalidInputError) as caught:
            pair.host.decrypt(sent, EvaluatedRows(response.c1, c0), ROWS, weights.row_scales)
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_other_weights_pass_as_documented(parameters: ParameterSet) -> None:
    """The check is not a proof: what is linear over tokens is not seen."""
    pair, plan = Pair.create(parameters), Plan(2, 64, 16)
    weights, other = make_weights(ROWS, CHANNELS, parameters), make_weights(ROWS, CHANNELS, parameters, seed=9)
    sent = pair.host.encrypt(np.ones((3, CHANNELS)), plan, weights.norm_bound, checked=True)
    group = EncodedGroup(other, parameters, [plan])
    response = pair.evaluator.evaluate(group, plan, sent.tokens, sent.ids, sent.seeds, sent.b)
    assert pair.host.decrypt(sent, response, ROWS, weights.row_scales).shape == (3, ROWS)
