from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks import (
    EncodedGroup,
    EncryptedActivations,
    EvaluatedRows,
    HostSession,
    ParameterSet,
    Plan,
    compile_plans,
    get_parameter_set,
    host,
    kernels,
    select_plan,
)
from tensorguard.ckks.randomness import SecretStream
from tensorguard.ckks.ring import ring
from tensorguard.errors import InvalidInputError, UnavailableError
from tests.ckks import reference
from tests.ckks.conftest import RINGS, SESSION, Pair, make_weights

PARAMETERS = get_parameter_set("n4096-q90-w12")


def relative_error(z: np.ndarray, x: np.ndarray, weights: object) -> float:
    """Largest error, in the units of property P4."""
    real = weights.integers * weights.row_scales[:, None]
    norms = np.maximum(np.linalg.norm(x, axis=1), 1e-300)[:, None]
    unit = norms * np.linalg.norm(real) / np.sqrt(x.shape[1])
    return float((np.abs(z - x @ real.T) / unit).max())


def secret_of(session: HostSession) -> np.ndarray:
    _, key = session._keys
    prime = session.parameters.primes[0]
    coefficients = reference.inverse(key[0].astype(np.uint64), prime).astype(np.int64)
    return np.where(coefficients > 1, coefficients - prime, coefficients)


def test_the_secret_is_ternary_and_the_public_key_an_encryption_of_zero(each_ring: ParameterSet) -> None:
    parameters = each_ring
    seed = os.urandom(32)
    session = HostSession.create(parameters, seed, SESSION)
    secret = secret_of(session)
    assert set(np.unique(secret)) == {-1, 0, 1}
    assert abs((secret**2).mean() - 2 / 3) < 0.06
    pk1 = reference.expand(parameters, reference.PUBLIC_KEY, SESSION, 0, seed)
    errors = []
    for index, prime in enumerate(parameters.primes):
        s = reference.transform(secret % prime, prime)
        phase = (session.public_key[index] + pk1[index] * s) % np.uint64(prime)
        error = reference.inverse(phase, prime).astype(np.int64)
        errors.append(np.where(error > prime // 2, error - prime, error))
    for error in errors[1:]:
        np.testing.assert_array_equal(errors[0], error)
    assert np.abs(errors[0]).max() <= 21
    assert 8 < errors[0].var() < 13


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from(RINGS),
    st.sampled_from(["t1.c288.r12", "t8.c64.r8", "t2.c100.r3", "t64.c7.r2"]),
    st.integers(1, 9),
    st.integers(1, 130),
    st.integers(0, 2**32 - 1),
)
def test_encryption_is_the_reference_bit_for_bit(name: str, identifier: str, tokens: int, d_in: int, seed: int) -> None:
    parameters, plan = get_parameter_set(name), Plan.parse(identifier)
    degree, error_words = parameters.degree, kernels.error_words(parameters.degree)
    rng = np.random.default_rng(seed)
    constants = ring(parameters)
    mantissas = rng.integers(-(2**30), 2**30, (tokens, d_in), np.int32, endpoint=True)
    count = plan.uploads(tokens, d_in)
    words = rng.integers(0, 2**64, (count, error_words), np.uint64)
    uniform = np.stack([rng.integers(0, p, (count, degree), np.uint32) for p in parameters.primes], axis=1)
    key = np.stack([rng.integers(0, p, degree, np.uint32) for p in parameters.primes])
    scale = parameters.scale(parameters.norm_bound(d_in, 16))
    b = np.empty_like(uniform)
    kernels.encrypt(
        mantissas,
        plan.shape,
        constants.scale(scale),
        words,
        uniform,
        constants.with_quotient(key),
        b,
        0,
        np.empty(degree, np.uint32),
        np.empty((2, kernels.error_values(degree)), np.int32),
        constants.factors,
        constants.primes,
    )
    for index in range(count):
        chunk, block = divmod(index, plan.blocks(d_in))
        message = reference.encode_activations(mantissas, plan, chunk, block, degree)
        plain = [m * scale + e for m, e in zip(message, reference.errors(words[index], degree), strict=True)]
        for i, prime in enumerate(parameters.primes):
            expected = reference.transform(np.array([v % prime for v in plain], np.uint64), prime)
            expected = (expected + uniform[index, i].astype(np.uint64) * key[i]) % np.uint64(prime)
            np.testing.assert_array_equal(b[index, i], expected)


@settings(max_examples=3, deadline=None)
@given(
    st.sampled_from(RINGS),
    st.sampled_from(["t1.c288.r12", "t8.c64.r8", "t2.c100.r3", "t64.c7.r2"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 4),
    st.integers(0, 2**32 - 1),
)
def test_a_pooled_encryption_plus_the_message_is_the_reference_bit_for_bit(
    name: str, identifier: str, tokens: int, d_in: int, ready: int, seed: int
) -> None:
    """Ciphertexts made in line first, then the pooled ones; each is its encryption of zero plus the transformed Δ·m."""
    parameters, plan, rng = get_parameter_set(name), Plan.parse(identifier), np.random.default_rng(seed)
    session = HostSession.create(parameters, os.urandom(32), SESSION, worker=3, pool_bytes=1 << 20)
    drawn: list[np.ndarray] = []

    class Recording(SecretStream):
        def words(self, *shape: int, **kept: str) -> np.ndarray:
            words = super().words(*shape, **kept)
            drawn.append(words.copy())
            return words

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "SecretStream", Recording)
        for _ in range(ready):
            session.pool.fill()
        x = rng.normal(size=(tokens, d_in))
        sent = session.encrypt(x, plan, parameters.norm_bound(d_in, 16))
    count = plan.uploads(tokens, d_in)
    pooled = min(ready, count)
    assert sent.pooled == pooled and len(session.pool) == ready - pooled
    in_line, lane = count - pooled, (3 | 1 << 15) << 48
    assert sent.ids.tolist() == [*((3 << 48) + 1 + k for k in range(in_line)), *(lane + 1 + k for k in range(pooled))]
    words = [*(drawn[-1] if in_line else []), *(w[0] for w in drawn[:pooled])]
    mantissas, norms = np.empty((tokens, d_in), np.int32), np.empty(tokens)
    assert kernels.normalise(x, mantissas, norms)
    scale = parameters.scale(parameters.norm_bound(d_in, 16))
    secret = secret_of(session)
    for index, number in enumerate(sent.ids.tolist()):
        chunk, block = divmod(index, plan.blocks(d_in))
        message = reference.encode_activations(mantissas, plan, chunk, block, parameters.degree)
        errors = reference.errors(words[index], parameters.degree)
        plain = [m * scale + e for m, e in zip(message, errors, strict=True)]
        own_seed = sent.seeds[32 * index : 32 * index + 32]
        a = reference.expand(parameters, reference.CIPHERTEXT, SESSION, number, own_seed)
        for i, prime in enumerate(parameters.primes):
            expected = reference.transform(np.array([v % prime for v in plain], np.uint64), prime)
            key = reference.transform(-secret % prime, prime)
            np.testing.assert_array_equal(sent.b[index, i], (expected + a[i] * key) % np.uint64(prime))
    session.close()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([1, 3, 16, 48, 128]),
    st.sampled_from([1, 31, 100, 576, 1000]),
    st.sampled_from([1, 2, 5, 8, 40]),
    st.integers(0, 2**32 - 1),
)
def test_products_are_exact_within_the_bound(rows: int, d_in: int, tokens: int, seed: int) -> None:
    pair = Pair.create(PARAMETERS)
    weights = make_weights(rows, d_in, PARAMETERS, seed, rank=min(rows, 128))
    plan = select_plan(compile_plans(PARAMETERS, d_in, rows), PARAMETERS, tokens, d_in, rows)
    x = np.random.default_rng(seed).normal(size=(tokens, d_in))
    assert relative_error(pair.product(x, weights, plan), x, weights) < 2**-14


@pytest.mark.parametrize("name", ["n4096-q90-w12", "n4096-q90-w16", "n8192-q150-w12", "n8192-q150-w16"])
@pytest.mark.parametrize(("rows", "d_in"), [(48, 576), (16, 4096), (16, 14336)])
def test_the_error_stays_under_the_bound_at_real_sizes(name: str, rows: int, d_in: int) -> None:
    parameters = get_parameter_set(name)
    pair = Pair.create(parameters)
    weights = make_weights(rows, d_in, parameters)
    x = np.random.default_rng(1).normal(size=(4, d_in))
    plan = select_plan(compile_plans(parameters, d_in, rows), parameters, 4, d_in, rows)
    assert relative_error(pair.product(x, weights, plan), x, weights) < 2**-14


def test_encryption_adds_the_noise_that_packing_counts_on(each_ring: ParameterSet) -> None:
    pair, weights = Pair.create(each_ring), make_weights(48, 576, each_ring)
    x = np.random.default_rng(3).normal(size=(64, 576))
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    products = pair.product(x, weights, Plan(1, 64, 64)) / weights.row_scales / norms
    errors = products - x @ weights.integers.T / norms
    # 3072 values: the measured deviation is within a few per cent of the true one.
    assert np.std(errors) == pytest.approx(each_ring.noise(weights.norm_bound), rel=0.1)


@pytest.mark.parametrize("plan", [Plan(1, 8192, 1), Plan(64, 128, 1), Plan(2, 4096, 1)])
def test_one_row_can_fill_the_larger_ring(plan: Plan) -> None:
    parameters = get_parameter_set("n8192-q150-w12")
    weights = make_weights(2, plan.channels, parameters, rank=2)
    x = np.random.default_rng(4).normal(size=(3, plan.channels))
    assert relative_error(Pair.create(parameters).product(x, weights, plan), x, weights) < 2**-14


def test_extreme_inputs(pair: Pair) -> None:
    weights = make_weights(16, 200, PARAMETERS)
    x = np.random.default_rng(2).normal(size=(8, 200))
    x[0] = 0.0
    x[1] = 0.0
    x[1, 7] = -3.0
    x[2, 5] = 1e30
    x[3] *= 1e-30
    x[4] *= 1e150
    x[5] = weights.integers[3]  # aligned with a row: the largest product there is
    x[6] = -weights.integers[3].astype(float)
    x[7] = 5e-324
    z = pair.product(x, weights, Plan(8, 64, 8))
    assert relative_error(z[1:7], x[1:7], weights) < 2**-14
    real = weights.integers * weights.row_scales[:, None]
    assert np.abs(z[0]).max() < 2**-14 * np.linalg.norm(real) / np.sqrt(200)
    np.testing.assert_allclose(z[1], -3.0 * real[:, 7], atol=2**-12 * np.linalg.norm(real) / np.sqrt(200))
    assert np.isfinite(z).all()


def test_no_input_can_wrap(parameters: ParameterSet) -> None:
    """One row takes the whole norm bound and the input is aligned with it."""
    pair = Pair.create(parameters)
    weights = make_weights(1, 300, parameters, rank=1)
    x = weights.integers.astype(np.float64)
    for sign in (1.0, -1.0):
        z = pair.product(sign * x, weights, Plan(1, 128, 1))
        np.testing.assert_allclose(z, sign * x @ x.T * weights.row_scales, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.7e308])
def test_values_without_a_finite_norm_are_refused(pair: Pair, value: float) -> None:
    x = np.ones((2, 64))
    x[1, 3:] = value
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        pair.host.encrypt(x, Plan(1, 64, 1), 4096.0)


@pytest.mark.parametrize("shape", [(0, 64), (64,), (1, 0), (1, 1, 64), (1 << 17, 1)])
def test_shapes_are_checked(pair: Pair, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError):
        pair.host.encrypt(np.ones(shape), Plan(1, 64, 1), 4096.0)


def test_identifiers_grow_per_worker_and_run_out(parameters: ParameterSet) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION, worker=5)
    x = np.ones((1, 64))
    first = session.encrypt(x, Plan(1, 32, 1), 4096.0)
    second = session.encrypt(x, Plan(1, 32, 1), 4096.0)
    assert first.ids.tolist() == [(5 << 48) + 1, (5 << 48) + 2]
    assert second.ids.tolist() == [(5 << 48) + 3, (5 << 48) + 4]
    assert first.seeds != second.seeds
    assert first.seeds[:32] != first.seeds[32:]
    session._in_line.next = session._in_line.last
    with pytest.raises(UnavailableError):
        session.encrypt(x, Plan(1, 32, 1), 4096.0)


def test_equal_inputs_never_give_equal_ciphertexts(pair: Pair) -> None:
    x = np.ones((1, 32))
    sent = [pair.host.encrypt(x, Plan(1, 32, 1), 4096.0) for _ in range(2)]
    assert not np.array_equal(sent[0].b, sent[1].b)


@pytest.mark.parametrize("damage", ["rows", "tokens", "c1 count", "c1 range", "c0 range", "dtype", "value"])
def test_malformed_responses_are_refused(pair: Pair, damage: str) -> None:
    weights = make_weights(4, 64, PARAMETERS)
    plan = Plan(1, 64, 4)
    sent = pair.host.encrypt(np.ones((2, 64)), plan, weights.norm_bound)
    group = EncodedGroup(weights, PARAMETERS, [plan])
    good = pair.evaluator.evaluate(group, plan, 2, sent.ids, sent.seeds, sent.b)
    c1, c0 = good.c1.copy(), good.c0.copy()
    match damage:
        case "rows":
            c0 = c0[:, :3]
        case "tokens":
            c0 = c0[:1]
        case "c1 count":
            c1 = c1[:1]
        case "c1 range":
            c1[0, 0] = PARAMETERS.primes[0]
        case "c0 range":
            c0[0, 0] = PARAMETERS.primes[0]
        case "dtype":
            c1 = c1.astype(np.int64)
        case "value":
            c0[0, 0] = (int(c0[0, 0]) + PARAMETERS.primes[0] // 2) % PARAMETERS.primes[0]
    with pytest.raises(InvalidInputError):
        pair.host.decrypt(sent, EvaluatedRows(c1, c0), 4, weights.row_scales)
    pair.host.decrypt(sent, good, 4, weights.row_scales)


def test_a_closed_session_has_no_key(parameters: ParameterSet) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    keys = session._keys
    session.close()
    assert session.closed
    assert not any(key.any() for key in keys)
    with pytest.raises(UnavailableError):
        session.encrypt(np.ones((1, 32)), Plan(1, 32, 1), 4096.0)


def test_close_wipes_the_pool_and_used_elements_are_overwritten(parameters: ParameterSet) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION, pool_bytes=1 << 20)
    for _ in range(3):
        session.pool.fill()
    used, *left = session.pool._ready
    one_row(session)
    assert not used.b.any() and all(zero.b.any() for zero in left)
    session.close()
    assert session.pool.closed and not any(zero.b.any() for zero in left)
    with pytest.raises(UnavailableError):
        session._make_zero()


def test_the_pool_is_bounded_and_off_by_default(parameters: ParameterSet) -> None:
    assert HostSession.create(parameters, bytes(32), SESSION).pool.capacity == 0
    session = HostSession.create(parameters, bytes(32), SESSION, pool_bytes=100_000)
    assert [session.pool.fill() for _ in range(3)] == [True, True, False]
    assert session.pool.nbytes == sum(zero.b.nbytes for zero in session.pool._ready) == 98_304


@pytest.mark.parametrize("worker", [-1, 1 << 15])
def test_worker_numbers_leave_room_for_the_pooled_lane(parameters: ParameterSet, worker: int) -> None:
    with pytest.raises(InvalidInputError, match="15 bits"):
        HostSession.create(parameters, bytes(32), SESSION, worker=worker)


class Paused:
    """Holds every call of one kernel until `go` is set; `entered` counts them."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)
        kernel = getattr(kernels, name)

        def paused(*arguments: Any) -> None:
            self.entered.release()
            assert self.go.wait(30)
            kernel(*arguments)

        monkeypatch.setattr(kernels, name, paused)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def one_row(session: HostSession) -> EncryptedActivations:
    return session.encrypt(np.ones((1, 32)), Plan(1, 32, 1), 4096.0)


def wait_until_closed(session: HostSession) -> None:
    deadline = time.monotonic() + 30
    while not session.closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_close_waits_for_an_encryption_whose_result_is_lost(
    parameters: ParameterSet, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    paused = Paused("encrypt", monkeypatch)
    encryption = threads.submit(one_row, session)
    assert paused.entered.acquire(timeout=30)
    closing = threads.submit(session.close)
    wait_until_closed(session)
    time.sleep(0.05)
    assert not closing.done() and all(key.any() for key in session._keys)
    with pytest.raises(UnavailableError):
        one_row(session)
    paused.go.set()
    with pytest.raises(UnavailableError):
        encryption.result(30)
    closing.result(30)
    assert not any(key.any() for key in session._keys)


def test_close_waits_for_a_decryption_whose_result_is_lost(
    parameters: ParameterSet, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair.create(parameters)
    weights, plan = make_weights(4, 32, parameters), Plan(1, 32, 4)
    sent = pair.host.encrypt(np.ones((1, 32)), plan, weights.norm_bound)
    group = EncodedGroup(weights, parameters, [plan])
    response = pair.evaluator.evaluate(group, plan, 1, sent.ids, sent.seeds, sent.b)
    paused = Paused("decrypt", monkeypatch)
    decryption = threads.submit(pair.host.decrypt, sent, response, 4, weights.row_scales)
    assert paused.entered.acquire(timeout=30)
    closing = threads.submit(pair.host.close)
    wait_until_closed(pair.host)
    assert all(key.any() for key in pair.host._keys)
    paused.go.set()
    with pytest.raises(UnavailableError):
        decryption.result(30)
    closing.result(30)


def test_a_call_that_outlasts_the_wait_loses_its_result(
    parameters: ParameterSet, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_LONGEST_CALL_SECONDS", 0.05)
    session = HostSession.create(parameters, bytes(32), SESSION)
    paused = Paused("encrypt", monkeypatch)
    encryption = threads.submit(one_row, session)
    assert paused.entered.acquire(timeout=30)
    session.close()
    assert not any(key.any() for key in session._keys)
    paused.go.set()
    with pytest.raises(UnavailableError):
        encryption.result(30)


def test_two_threads_encrypt_at_the_same_time(
    parameters: ParameterSet, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    paused = Paused("encrypt", monkeypatch)
    encryptions = [threads.submit(one_row, session) for _ in range(2)]
    assert all(paused.entered.acquire(timeout=30) for _ in encryptions)
    paused.go.set()
    first, second = (encryption.result(30) for encryption in encryptions)
    assert first.ids[0] != second.ids[0]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.01))
def test_no_ciphertext_is_readable_whenever_the_key_is_closed(delay: float) -> None:
    """Of the zero vector a wiped key makes the bare error; under a key it is uniform."""
    session = HostSession.create(PARAMETERS, os.urandom(32), SESSION)
    sent: list[EncryptedActivations] = []

    def encrypt_until_closed() -> None:
        while True:
            try:
                sent.append(session.encrypt(np.zeros((1, 32)), Plan(1, 32, 1), 4096.0))
            except UnavailableError:
                return

    workers = [threading.Thread(target=encrypt_until_closed) for _ in range(2)]
    for worker in workers:
        worker.start()
    time.sleep(delay)
    session.close()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    prime = PARAMETERS.primes[0]
    for encrypted in sent[-4:]:
        b = reference.inverse(encrypted.b[0, 0].astype(np.uint64), prime).astype(np.int64)
        assert np.abs(np.where(b > prime // 2, b - prime, b)).max() > prime // 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_an_encryption_has_no_key_and_does_not_wait(
    parameters: ParameterSet, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    paused = Paused("encrypt", monkeypatch)
    encryption = threads.submit(one_row, session)
    assert paused.entered.acquire(timeout=30)
    holding = threading.Event()
    held = threads.submit(hold, session, holding, paused.go)  # the lock, too, is held by a thread the child lacks
    assert holding.wait(30)
    child = os.fork()
    if child == 0:
        refused = False
        try:
            one_row(session)
        except UnavailableError:
            refused = True
        session.close()
        os._exit(0 if refused and not any(key.any() for key in session._keys) else 1)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.01)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
    paused.go.set()
    held.result(30)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert encryption.result(30) is not None and not session.closed


def hold(session: HostSession, holding: threading.Event, until: threading.Event) -> None:
    with session._state:
        holding.set()
        assert until.wait(30)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_no_key(parameters: ParameterSet) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    child = os.fork()
    if child == 0:
        os._exit(0 if session.closed else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not session.closed


def test_secret_holders_show_nothing_and_cannot_be_copied(pair: Pair) -> None:
    assert repr(pair.host) == "HostSession()"
    sent = pair.host.encrypt(np.full((1, 32), 0.123), Plan(1, 32, 1), 4096.0)
    assert repr(sent) == "EncryptedActivations(plan=t1.c32.r1, tokens=1)"
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(pair.host)


def test_session_arguments_are_checked(parameters: ParameterSet) -> None:
    for seed, identifier, worker in ((bytes(31), b"s", 0), (bytes(32), b"", 0), (bytes(32), b"s", 1 << 16)):
        with pytest.raises(InvalidInputError):
            HostSession.create(parameters, seed, identifier, worker=worker)


def test_sessions_are_forgotten_when_dropped(parameters: ParameterSet) -> None:
    session = HostSession.create(parameters, bytes(32), SESSION)
    assert session in host._SESSIONS
    before = len(host._SESSIONS)
    del session
    assert len(host._SESSIONS) < before


@pytest.mark.parametrize("ready", [0, 2])
def test_nothing_is_left_of_errors_and_messages(ready: int) -> None:
    """With its error a ciphertext tells the key, also after the key was destroyed."""
    parameters = get_parameter_set("n4096-q90-w12")
    session = HostSession.create(parameters, os.urandom(32), SESSION, pool_bytes=1 << 20)
    for _ in range(ready):
        session.pool.fill()
    session.encrypt(np.ones((1, 64)), Plan(1, 64, 8), parameters.norm_bound(64, 16))
    kept = host.scratch._kept
    assert {"signed", "encryption errors"} <= kept.keys()
    assert not kept["signed"].any() and not kept["encryption errors"].any()
