"""The engine on OpenFHE, held against our arithmetic residue by residue, and what it takes away from an attacker."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tensorguard.ckks import Plan
from tensorguard.ckks.ntt import inverse_all
from tensorguard.ckks.ring import ring
from tensorguard.ckks.weights import GroupWeights
from tensorguard.engines import load_engine
from tensorguard.engines.openfhe import blobs, context, embedding, engine, flood
from tensorguard.engines.openfhe.engine import OpenFheEvaluator
from tensorguard.errors import ConfigurationError, UnavailableError
from tests.ckks import reference
from tests.ckks.conftest import make_weights
from tests.engines.conftest import Pair

PLAN = Plan(2, 64, 16)


def ours(pair: Pair, ciphertext: Any, primes: int | None = None) -> np.ndarray:
    """Residues [2, primes, N] of an OpenFHE ciphertext in our transform order."""
    own = context.shared_context(pair.engine.library, pair.parameters)
    count = len(pair.parameters.primes) if primes is None else primes
    theirs = blobs.read(
        own.library.Serialize(ciphertext, own.library.BINARY), pair.parameters.primes[:count], pair.parameters.degree
    )
    result = np.empty(theirs.shape, np.uint32)
    for index in range(count):
        result[:, index, own.order[index]] = theirs[:, index]
    return result


def coefficients(pair: Pair, residues: np.ndarray) -> np.ndarray:
    """uint32 [n, primes, N] from the transform domain."""
    result = np.empty_like(residues)
    constants = ring(pair.parameters)
    inverse_all(residues.copy(), result, constants.factors, constants.primes)
    return result


def phase(pair: Pair, ciphertext: Any) -> np.ndarray:
    """c0 + c1·s, int64 [N], centred modulo the first prime; honest values are far smaller than that."""
    c0, c1 = ours(pair, ciphertext).astype(np.int64)
    primes = np.array(pair.parameters.primes)[:, None]
    minus_s = pair.host._keys[0][:, 0].astype(np.int64)
    values = coefficients(pair, ((c0 - c1 * minus_s % primes) % primes).astype(np.uint32)[None])[0].astype(np.int64)
    centred = np.where(values > primes // 2, values - primes, values)
    assert (centred == centred[0]).all(), "not a small value: the residues are of different integers"
    return centred[0]


# The ring


@pytest.mark.parametrize("weights", ["random", "largest"])
def test_products_are_those_of_our_engine_bit_for_bit(openfhe: Pair, weights: str) -> None:
    """Σ_blocks c·Ŵ of one response, every residue of every prime: the reference, which `cpu` equals everywhere."""
    parameters = openfhe.parameters
    chosen = make_weights(16, 200, parameters, seed=3)
    if weights == "largest":
        ends = np.where(np.random.default_rng(0).random((16, 200)) < 0.5, 2**31 - 1, -(2**31))
        chosen = GroupWeights(ends.astype(np.int32), (0,) * 16, 2.0**40)
    sent = openfhe.host.encrypt(np.random.default_rng(1).normal(size=(2, 200)), PLAN, 1e6)
    evaluator = openfhe.evaluator
    group = openfhe.engine.encode(chosen, parameters, [PLAN])
    inputs = evaluator._inputs(sent.ids, sent.seeds, sent.b, range(4))
    product = ours(openfhe, evaluator._product(inputs, group.encoded(PLAN)[0]))
    a = evaluator._expander.expand(sent.ids.tolist(), sent.seeds)
    degree, expected = parameters.degree, np.zeros_like(product)
    for block in range(4):
        polynomial = np.array(reference.encode_weights(chosen.integers, PLAN, 0, block, degree))
        for index, prime in enumerate(parameters.primes):
            transformed = reference.transform(polynomial % prime, prime)
            for half, sent_half in enumerate((sent.b, a)):
                term = sent_half[block, index].astype(np.uint64) * transformed % np.uint64(prime)
                expected[half, index] = (expected[half, index] + term) % np.uint64(prime)
    np.testing.assert_array_equal(product, expected)


def whole(limbs: np.ndarray) -> list[int]:
    return [sum(int(limb) << (30 * k) for k, limb in enumerate(column)) for column in limbs.T]


def without_zero(evaluator: OpenFheEvaluator) -> Any:
    return evaluator._context.zero


def test_a_response_without_fresh_randomness_is_the_reference_bit_for_bit(
    openfhe: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the encryption of zero: product, flood, modulus switch, the choice of coefficients."""
    primes, q = openfhe.parameters.primes, openfhe.parameters.modulus
    weights, plan = make_weights(3, 64, openfhe.parameters), Plan(2, 64, 3)
    drawn = flood.limbs(openfhe.parameters.flood_bits, 6)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(flood, "limbs", lambda bits, outputs: asked.append((bits, outputs)) or drawn)
    monkeypatch.setattr(OpenFheEvaluator, "_encryption_of_zero", without_zero)
    sent = openfhe.host.encrypt(np.random.default_rng(2).normal(size=(2, 64)), plan, weights.norm_bound)
    response = openfhe.evaluate(weights, sent)
    assert asked == [(openfhe.parameters.flood_bits, 6)]
    a = openfhe.evaluator._expander.expand(sent.ids.tolist(), sent.seeds)
    polynomial = reference.encode_weights(weights.integers, plan, 0, 0, openfhe.parameters.degree)
    c0, c1 = (
        reference.negacyclic(reference.combine(coefficients(openfhe, half)[0], primes), polynomial, q)
        for half in (sent.b, a)
    )
    assert response.c1[0].tolist() == [reference.switch(value, primes) for value in c1]
    for index, f in enumerate(whole(drawn)):
        token, row = divmod(index, 3)
        assert response.c0[token, row] == reference.switch(c0[reference.wanted(plan, token, row)] + f, primes)


def test_openfhe_decrypts_what_our_host_encrypts(openfhe: Pair) -> None:
    """With our secret key read back as one of its own; its decoder works in doubles."""
    parameters, own = openfhe.parameters, context.shared_context(openfhe.engine.library, openfhe.parameters)
    library, binary = own.library, own.library.BINARY
    data = library.Serialize(own.crypto.KeyGen().secretKey, binary)
    offsets = blobs._offsets(data + data, parameters.primes, parameters.degree)[: len(parameters.primes)]
    minus_s = openfhe.host._keys[0][:, 0].astype(np.int64)
    s = (np.array(parameters.primes)[:, None] - minus_s) % np.array(parameters.primes)[:, None]
    template = blobs.Template(data, offsets, parameters.degree)
    secret = library.DeserializePrivateKeyString(template.write(own._theirs(s.astype(np.uint32))), binary)
    x = np.random.default_rng(4).normal(size=(1, 100))
    sent = openfhe.host.encrypt(x, Plan(1, 100, 1), 1.0)
    (a,) = openfhe.evaluator._expander.expand(sent.ids.tolist(), sent.seeds)
    ciphertext = own.ciphertext(sent.b[0], a)
    own.switch(ciphertext)
    decrypted = own.crypto.Decrypt(secret, ciphertext)
    decrypted.SetLength(parameters.degree // 2)
    twist, order = embedding._constants(parameters.degree)
    values = np.zeros(parameters.degree, np.complex128)
    values[order] = decrypted.GetCKKSPackedValue()
    values[parameters.degree - 1 - order] = values[order].conj()  # the value at the conjugate point
    found = (np.fft.fft(values, norm="forward") / twist).real[:100]
    scale = parameters.scale(1.0) * 2**30 / (parameters.modulus // parameters.primes[0])
    expected = x[0] / np.linalg.norm(x) * scale
    assert np.abs(expected).max() > 2**24
    assert np.abs(found - expected).max() < 150, "the rounding of c1 has a deviation of 15"


# The flood and the encryption of zero


@pytest.mark.parametrize("bits", [30, 44, 64, 94, 118])
def test_the_flood_is_four_uniform_integers(bits: int) -> None:
    limbs = flood.limbs(bits, 4000)
    assert np.abs(limbs).max() < 2.0**embedding.LARGEST_COEFFICIENT_BITS
    values = np.array(whole(limbs), object)
    assert (values >= -(2 ** (bits + 1))).all() and (values < 2 ** (bits + 1)).all()
    scaled = (values / 2**bits).astype(float)
    assert abs(scaled.mean()) < 0.06, "six deviations"
    assert abs(scaled.std() * np.sqrt(3.0) - 1.0) < 0.07
    low = np.array([value % 16 for value in values.tolist()])
    counts = np.bincount(low, minlength=16)
    assert ((counts - 250.0) ** 2 / 250.0).sum() < 60, "chi-square of 15 degrees, exceeded once in 10**6"


def test_the_flood_arrives_exactly_and_only_where_it_is_wanted(openfhe: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = openfhe.parameters
    wanted = engine._wanted(Plan(8, 32, 16), 8, 16)
    drawn = flood.limbs(parameters.flood_bits, wanted.size)
    drawn[:, :2] = [[4 * (2.0**30 - 1), 0.0]] * (len(drawn) - 1) + [[2.0**35 - 4, -(2.0**35)]]  # its two ends
    monkeypatch.setattr(flood, "limbs", lambda bits, outputs: drawn)
    c0, c1 = ours(openfhe, openfhe.evaluator._flooded(openfhe.evaluator._context.zero.Clone(), wanted))
    expected = np.zeros(parameters.degree, object)
    expected[wanted.reshape(-1)] = whole(drawn)
    for index, prime in enumerate(parameters.primes):
        np.testing.assert_array_equal(coefficients(openfhe, c0[None])[0, index], expected % prime)
    assert not c1.any()


def test_an_encryption_of_zero_has_the_errors_that_the_privacy_bound_counts(openfhe: Pair) -> None:
    """e·u + e0 + e1·s under the host's key: OpenFHE's errors have σ = 3.19, its u and our s are ternary."""
    parameters = openfhe.parameters
    expected = np.sqrt((10.5 + 3.19**2) * 2 * parameters.degree / 3 + 3.19**2)
    noises = [phase(openfhe, openfhe.evaluator._encryption_of_zero()) for _ in range(3)]
    for noise in noises:
        assert abs(noise.std() / expected - 1.0) < 0.1
    assert max(noise.std() for noise in noises) < np.sqrt(2.0 * 10.5 * 2 * parameters.degree / 3) * 1.1
    assert not np.array_equal(noises[0], noises[1])


def test_every_thread_has_randomness_of_its_own(openfhe: Pair) -> None:
    """OpenFHE seeds a generator for each thread; a copied one would make two responses with one u."""

    def first(_: int) -> bytes:
        mask = ours(openfhe, openfhe.evaluator._encryption_of_zero())
        barrier.wait()
        return bytes(mask[1])

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(first, range(4)))) == 4


# What an attacker gets


def division(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> float:
    """How many values of the transformed weights c1 / a finds, of a c1 from before the modulus switch."""
    captured: list[np.ndarray] = []
    switch = context.Context.switch

    def watch(own: context.Context, ciphertext: Any) -> None:
        captured.append(ours(pair, ciphertext)[1, 0])
        switch(own, ciphertext)

    monkeypatch.setattr(context.Context, "switch", watch)
    plan = Plan(1, 64, 16)
    weights = make_weights(16, 64, pair.parameters)
    sent = pair.host.encrypt(np.ones((1, 64)), plan, weights.norm_bound)
    pair.evaluate(weights, sent)
    prime = int(pair.parameters.primes[0])
    a = pair.evaluator._expander.expand(sent.ids.tolist(), sent.seeds)[0, 0].astype(object)
    polynomial = np.array(reference.encode_weights(weights.integers, plan, 0, 0, pair.parameters.degree)) % prime
    transformed = reference.transform(polynomial, prime).astype(object)
    inverses = np.array([pow(int(value), -1, prime) for value in a], dtype=object)
    return float(np.mean(captured[0].astype(object) * inverses % prime == transformed))


def test_division_recovers_the_weights_where_nothing_is_added(openfhe: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack is real: with the encryption of zero taken out, every transformed weight is found."""
    monkeypatch.setattr(OpenFheEvaluator, "_encryption_of_zero", without_zero)
    assert division(openfhe, monkeypatch) == 1.0


def test_division_recovers_nothing_from_a_response(openfhe: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert division(openfhe, monkeypatch) < 1e-3


def test_a_forked_child_evaluates_nothing(openfhe: Pair) -> None:
    """OpenFHE's generator would go on from the parent's state: two responses with one u."""
    weights = make_weights(1, 64, openfhe.parameters)
    sent = openfhe.host.encrypt(np.ones((1, 64)), PLAN, weights.norm_bound)
    group = openfhe.engine.encode(weights, openfhe.parameters, [PLAN])
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # OpenMP may wait in the child for threads that are not there
        try:
            openfhe.evaluator.evaluate(group, PLAN, 1, sent.ids, sent.seeds, sent.b)
        except UnavailableError:
            os._exit(17)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


# Where it cannot run


def test_a_python_that_openfhe_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openfhe", None)
    with pytest.raises(ConfigurationError, match=r"cannot run here.*Python 3\.10.*glibc.*--backend cpu"):
        load_engine("openfhe")


def test_a_version_with_another_form_is_refused(openfhe: Pair) -> None:
    own = context.shared_context(openfhe.engine.library, openfhe.parameters)
    primes, degree, data = openfhe.parameters.primes, openfhe.parameters.degree, own.ciphertexts.data
    first = own.ciphertexts.offsets[0]
    for other in (data[:-2000], data[: first - 8] + b"\1" + data[first - 7 :], b""):
        with pytest.raises(ConfigurationError, match="unknown form"):
            blobs.Template.of(other, primes, degree)
        with pytest.raises(ConfigurationError, match="unknown form"):
            blobs.read(other, primes, degree)
    with pytest.raises(ConfigurationError, match="unknown form"):
        blobs.read(own.ciphertexts.write(np.full((2, len(primes), degree), primes[0], np.uint32)), primes, degree)


def test_a_version_that_keeps_its_own_primes_is_refused(openfhe: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    library = openfhe.engine.library
    monkeypatch.setattr(context, "_patch", lambda description, parameters: None)
    with pytest.raises(ConfigurationError, match="does not take the primes"):
        context._make(library, openfhe.parameters)
    monkeypatch.setattr(context, "_patch", lambda description, parameters: description["cc"])
    with pytest.raises(ConfigurationError, match="does not take the primes"):
        context._make(library, openfhe.parameters)
    points = np.stack(
        [reference.transform(np.eye(1, openfhe.parameters.degree, 1)[0], prime) for prime in openfhe.parameters.primes]
    )
    points[-1, 5] += 1
    with pytest.raises(ConfigurationError, match="does not take the primes"):
        context._order(openfhe.parameters, points)
