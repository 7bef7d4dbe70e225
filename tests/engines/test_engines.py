"""What every engine must do, whoever does its arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorguard.ckks import GroupWeights, HostSession, ParameterSet, Plan, compile_plans, get_parameter_set
from tensorguard.engines import BACKENDS, Engine, EngineOptions, load_engine
from tensorguard.errors import ConfigurationError, InvalidInputError, NotFoundError
from tests.ckks.conftest import make_weights
from tests.engines.conftest import SESSION, Pair

DEVIATIONS = 7.0
"""Exceeded with probability below 2**-38 a value."""


def tolerance(parameters: ParameterSet, weights: GroupWeights, x: np.ndarray) -> np.ndarray:
    """The stated precision: noise of the encryption, and half a unit of the 2**30 fixed point, per token [T, 1]."""
    mantissa = np.linalg.norm(weights.integers, axis=1).max() * np.sqrt(x.shape[1]) * 2.0**-31
    noise = DEVIATIONS * parameters.noise(weights.norm_bound) + mantissa
    return np.linalg.norm(x, axis=1, keepdims=True) * noise * weights.row_scales.max()


@pytest.mark.parametrize(
    ("identifier", "tokens", "rows", "d_in"),
    [
        ("t1.c512.r8", 1, 16, 1024),
        ("t1.c288.r12", 1, 48, 576),
        ("t1.c4096.r1", 2, 3, 4096),
        ("t2.c37.r2", 3, 3, 100),
        ("t8.c16.r4", 13, 7, 40),
        ("t16.c32.r8", 16, 8, 64),
        ("t64.c2.r2", 65, 3, 5),
        ("t1.c1.r1", 1, 1, 1),
    ],
)
def test_products_are_right_and_agree_with_cpu(pair: Pair, identifier: str, tokens: int, rows: int, d_in: int) -> None:
    plan = Plan.parse(identifier)
    weights = make_weights(rows, d_in, pair.parameters, seed=rows)
    x = np.random.default_rng(tokens).normal(size=(tokens, d_in))
    sent = pair.host.encrypt(x, plan, weights.norm_bound)
    z = pair.host.decrypt(sent, pair.evaluate(weights, sent), rows, weights.row_scales)
    cpu = load_engine("cpu")
    evaluator = cpu.evaluator(pair.parameters, pair.host.public_key, pair.seed, SESSION)
    rows_by_cpu = Pair(cpu, pair.parameters, pair.host, pair.seed, evaluator).evaluate(weights, sent)
    same = pair.host.decrypt(sent, rows_by_cpu, rows, weights.row_scales)
    expected = x @ (weights.integers * weights.row_scales[:, None]).T
    within = tolerance(pair.parameters, weights, x)
    assert (np.abs(z - expected) <= within).all()
    assert (np.abs(z - same) <= np.sqrt(2.0) * within).all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_products_of_any_shape(pair: Pair, tokens: int, rows: int, d_in: int, seed: int) -> None:
    weights = make_weights(rows, d_in, pair.parameters, seed)
    (plan,) = compile_plans(pair.parameters, d_in, rows, [min(64, 1 << (tokens - 1).bit_length())])
    x = np.random.default_rng(seed).normal(size=(tokens, d_in)) * 10.0 ** np.arange(tokens)[:, None]
    expected = x @ (weights.integers * weights.row_scales[:, None]).T
    assert (np.abs(pair.product(x, weights, plan) - expected) <= tolerance(pair.parameters, weights, x)).all()


def test_weights_at_the_ends_of_their_type(pair: Pair) -> None:
    integers = np.array([[2**31 - 1, -(2**31), 1, -1]], np.int32)
    weights = GroupWeights(integers, (31,), 2.0**32)
    x = np.diag([1.0, 1.0, 1.0, 1.0])
    expected = x @ (integers.astype(np.float64) * 2.0**-31).T
    z = pair.product(x, weights, Plan(4, 4, 1))
    assert (np.abs(z - expected) <= tolerance(pair.parameters, weights, x)).all()


@pytest.fixture
def request_parts(pair: Pair) -> dict[str, Any]:
    plan = Plan(2, 64, 4)
    weights = make_weights(8, 128, pair.parameters)
    sent = pair.host.encrypt(np.ones((3, 128)), plan, weights.norm_bound)
    group = pair.engine.encode(weights, pair.parameters, [plan])
    return {"group": group, "plan": plan, "tokens": 3, "ids": sent.ids, "seeds": sent.seeds, "b": sent.b}


def _unreduced(b: np.ndarray, prime: int) -> np.ndarray:
    broken = b.copy()
    broken[-1, 1, 17] = prime
    return broken


MALFORMED = {
    "too many tokens": lambda parts, _: {"tokens": 7},
    "no token": lambda parts, _: {"tokens": 0},
    "an id too few": lambda parts, _: {"ids": parts["ids"][:-1]},
    "ids of another type": lambda parts, _: {"ids": parts["ids"].astype(np.int64)},
    "a seed too long": lambda parts, _: {"seeds": parts["seeds"] + b"\0"},
    "a ciphertext too few": lambda parts, _: {"b": parts["b"][:-1]},
    "a prime too few": lambda parts, _: {"b": parts["b"][:, :-1]},
    "residues of another type": lambda parts, _: {"b": parts["b"].astype(np.uint64)},
    "a residue that is its prime": lambda parts, p: {"b": _unreduced(parts["b"], p.primes[1])},
    "one id twice": lambda parts, _: {"ids": np.repeat(parts["ids"][:1], len(parts["ids"]))},
    "ids that fall": lambda parts, _: {"ids": parts["ids"][::-1].copy()},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests_are_refused(pair: Pair, request_parts: dict[str, Any], what: str) -> None:
    changes = MALFORMED[what](request_parts, pair.parameters)
    with pytest.raises(InvalidInputError):
        pair.evaluator.evaluate(**request_parts | changes)
    pair.evaluator.evaluate(**request_parts)  # a refused request uses up no identifier


def test_identifiers_are_used_once(pair: Pair, request_parts: dict[str, Any]) -> None:
    pair.evaluator.evaluate(**request_parts)
    with pytest.raises(InvalidInputError, match="used before"):
        pair.evaluator.evaluate(**request_parts)


def test_only_compiled_plans_and_own_parameters(pair: Pair, request_parts: dict[str, Any]) -> None:
    with pytest.raises(NotFoundError, match=r"t2\.c32\.r4"):
        pair.evaluator.evaluate(**request_parts | {"plan": Plan(2, 32, 4)})
    other = get_parameter_set("n4096-q90-w13")
    group = pair.engine.encode(make_weights(8, 128, other), other, [request_parts["plan"]])
    with pytest.raises(InvalidInputError, match="another parameter set"):
        pair.evaluator.evaluate(**request_parts | {"group": group})


def test_bad_keys_are_refused(pair: Pair) -> None:
    good = pair.host.public_key
    for key in (good[:2], good.astype(np.uint64), good | np.uint32(1 << 31), good[:, :-1]):
        with pytest.raises(InvalidInputError):
            pair.engine.evaluator(pair.parameters, key, bytes(32), SESSION)
    for seed, session_id in ((bytes(31), SESSION), (bytes(32), b"")):
        with pytest.raises(InvalidInputError):
            pair.engine.evaluator(pair.parameters, good, seed, session_id)


def test_responses_are_fresh(pair: Pair, request_parts: dict[str, Any]) -> None:
    """The same request under the same key: nothing of one response is in the next."""
    first = pair.evaluator.evaluate(**request_parts)
    again = pair.engine.evaluator(pair.parameters, pair.host.public_key, pair.seed, SESSION).evaluate(**request_parts)
    assert first.c1.dtype == again.c1.dtype == first.c0.dtype == np.uint32
    assert (first.c1 == again.c1).mean() < 1e-2
    assert not np.array_equal(first.c0, again.c0)
    assert max(first.c1.max(), first.c0.max()) < pair.parameters.primes[0]


def test_operations_are_counted_and_none_is_a_rotation(pair: Pair, request_parts: dict[str, Any]) -> None:
    evaluator = pair.engine.evaluator(pair.parameters, pair.host.public_key, pair.seed, SESSION)
    evaluator.evaluate(**request_parts)
    counters = evaluator.counters
    assert (counters.products, counters.rerandomisations, counters.modulus_switches) == (8, 4, 4)
    assert counters.additions >= 8 and counters.rotations == 0
    public = {name for name in dir(type(evaluator)) if not name.startswith("_")}
    assert public == {"evaluate", "close"}, "an evaluator offers no other operation on ciphertexts"


def test_openfhe_takes_one_thread() -> None:
    with pytest.raises(ConfigurationError, match="leave threads at 1"):
        load_engine("openfhe", EngineOptions(threads=2))


def test_unknown_backend() -> None:
    with pytest.raises(ConfigurationError, match=", ".join(BACKENDS)):
        load_engine("seal")


def test_nothing_is_kept_of_the_weights_but_the_encoding(engine: Engine[Any], parameters: ParameterSet) -> None:
    plans = [Plan(1, 64, 4), Plan(8, 64, 4)]
    group = engine.encode(make_weights(8, 128, parameters), parameters, plans)
    assert group.plans == frozenset(plans) and (group.rows, group.d_in) == (8, 128)
    assert group.nbytes > 0 and group.parameters == parameters
    assert "array" not in repr(group) and HostSession.__name__ not in repr(group)


def test_several_threads_share_weights_and_key(pair: Pair) -> None:
    plan, x = Plan(1, 64, 4), np.ones((1, 128))
    weights = make_weights(4, 128, pair.parameters)
    group = pair.engine.encode(weights, pair.parameters, [plan])
    sent = [pair.host.encrypt(x, plan, weights.norm_bound) for _ in range(4)]
    expected = x @ (weights.integers * weights.row_scales[:, None]).T
    within = tolerance(pair.parameters, weights, x)
    public_key, seed = pair.host.public_key, pair.seed
    evaluators = [pair.engine.evaluator(pair.parameters, public_key, seed, SESSION) for _ in range(3)]

    def run(part: int) -> bool:
        answers = [evaluators[part].evaluate(group, plan, 1, s.ids, s.seeds, s.b) for s in sent]
        z = [pair.host.decrypt(s, rows, 4, weights.row_scales) for s, rows in zip(sent, answers, strict=True)]
        return bool((np.abs(np.stack(z) - expected) <= within).all())

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))
