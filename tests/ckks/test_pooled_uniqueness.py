"""No encryption of zero is ever used twice, whoever takes it and whatever happens to the pool meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tensorguard.ckks import EncodedGroup, EncryptedActivations, ParameterSet, Plan
from tensorguard.ckks.pool import Pool
from tests.ckks.conftest import Pair, make_weights

PLAN = Plan(1, 16, 1)
CALLS, THREADS = 300, 4


@pytest.fixture
def filled(parameters: ParameterSet) -> Iterator[Pair]:
    """Both sides with small pools that one thread each fills as fast as it can: full, short and empty in turn."""
    pair, stop = Pair.create(parameters, pool_bytes=800_000), threading.Event()

    def fill(pool: Pool) -> None:
        while not stop.is_set():
            pool.fill()
            stop.wait(0.001)

    fillers = [threading.Thread(target=fill, args=(side.pool,)) for side in (pair.host, pair.evaluator)]
    for filler in fillers:
        filler.start()
    yield pair
    stop.set()
    for filler in fillers:
        filler.join()
    pair.host.close()
    pair.evaluator.pool.close()


def test_no_two_ciphertexts_share_an_identifier_a_seed_or_a_mask(filled: Pair) -> None:
    """Of the zero vector b is the mask itself: -a·s + NTT(e)."""

    def encrypt(_: int) -> list[EncryptedActivations]:
        return [filled.host.encrypt(np.zeros((1, 16 * (1 + n % 3))), PLAN, 4096.0) for n in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as threads:
        sent = [encrypted for part in threads.map(encrypt, range(THREADS)) for encrypted in part]
    ids = [number for encrypted in sent for number in encrypted.ids.tolist()]
    seeds = [e.seeds[at : at + 32] for e in sent for at in range(0, len(e.seeds), 32)]
    masks = [hash(b.tobytes()) for encrypted in sent for b in encrypted.b]
    pooled = sum(encrypted.pooled for encrypted in sent)
    assert 0 < pooled < len(ids), "both ways were used"
    assert len(ids) == len(seeds) == len(masks) >= 2 * THREADS * (CALLS - 3)
    assert len(set(ids)) == len(set(seeds)) == len(set(masks)) == len(ids)


def test_no_two_responses_share_their_randomness(filled: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of zero c1 is the encryption of zero alone, and equal u and e1 would give equal c1."""
    weights = make_weights(3, 16, filled.parameters)
    weights.integers[:] = 0
    group = EncodedGroup(weights, filled.parameters, [PLAN])
    order = threading.Lock()
    responses: list[bytes] = []
    pooled: list[int] = []
    take = filled.evaluator.pool.take
    monkeypatch.setattr(filled.evaluator.pool, "take", lambda n: pooled.append(len(got := take(n))) or got)

    def call(_: int) -> list[bytes]:
        seen = []
        for _ in range(CALLS // 3):
            with order:  # the identifiers of one key come in order, as in a session
                sent = filled.host.encrypt(np.zeros((1, 16)), PLAN, 4096.0)
                filled.evaluator._admission._take_ids(sent.ids)
            answer = filled.evaluator._evaluate(group, group.encoded(PLAN), PLAN, 1, sent.ids, sent.seeds, sent.b)
            seen += [c1.tobytes() for c1 in answer.c1]
        return seen

    with ThreadPoolExecutor(THREADS) as threads:
        for part in threads.map(call, range(THREADS)):
            responses += part
    assert 0 < sum(pooled) < len(responses) == THREADS * (CALLS // 3) * 3
    assert len(set(responses)) == len(responses)


def test_the_two_ways_mix_in_one_session(filled: Pair) -> None:
    """The evaluator accepts every request, and the products are right."""
    weights = make_weights(5, 40, filled.parameters)
    x = np.random.default_rng(0).normal(size=(2, 40))
    real = x @ (weights.integers * weights.row_scales[:, None]).T
    for _ in range(30):
        z = filled.product(x, weights, PLAN)
        np.testing.assert_allclose(z, real, atol=2**-9 * np.abs(real).max())


def test_a_used_mask_would_show(filled: Pair) -> None:
    """What the tests above look for: the same element used again gives the same identifier, seed and mask."""
    zero = filled.host._make_zero()
    kept = type(zero)(zero.identifier, zero.seed, zero.b.copy())
    results = [
        filled.host._encrypt(np.zeros((1, 1), np.int32), PLAN, filled.host._ring.scale(1), 1, [element])
        for element in (zero, kept)
    ]
    assert results[0][0] == results[1][0] and results[0][1] == results[1][1]
    np.testing.assert_array_equal(results[0][2], results[1][2])
