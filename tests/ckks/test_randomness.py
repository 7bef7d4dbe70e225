from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tensorguard.ckks import ParameterSet, get_parameter_set, kernels
from tensorguard.ckks.randomness import SecretStream, UniformExpander
from tensorguard.ckks.ring import ring
from tests.ckks import reference

VECTORS = json.loads((Path(__file__).parent / "vectors" / "expansion.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["expansions"], ids=lambda v: v["label"] + v["identifier"])
def test_expansion_matches_the_known_vectors(parameters: ParameterSet, vector: dict) -> None:
    public_key = vector["label"] == reference.PUBLIC_KEY.decode()
    expander = UniformExpander(parameters, VECTORS["session"].encode(), public_key=public_key)
    residues = expander.expand([int(vector["identifier"])], bytes.fromhex(VECTORS["seed"]))[0]
    assert residues[:, :4].tolist() == vector["first"]
    assert residues[:, -4:].tolist() == vector["last"]
    assert hashlib.sha256(residues.astype("<u4").tobytes()).hexdigest() == vector["sha256"]


def test_expansion_matches_the_reference_where_words_are_rejected(parameters: ParameterSet) -> None:
    expander = UniformExpander(parameters, b"s")
    residues = expander.expand(list(range(1, 21)), b"".join(bytes([i]) * 32 for i in range(1, 21)))
    for i in range(1, 21):
        expected = reference.expand(parameters, reference.CIPHERTEXT, b"s", i, bytes([i]) * 32)
        np.testing.assert_array_equal(residues[i - 1], expected)
    # A prime just above 2**29 rejects about half the words: the stream is read on, never restarted elsewhere.
    small = (2**29 + 11, 2**29 + 11, 2**29 + 11)
    expander._primes = np.array(small, np.uint32)
    np.testing.assert_array_equal(
        expander.expand([7], bytes(32))[0],
        reference.expand(parameters, reference.CIPHERTEXT, b"s", 7, bytes(32), small),
    )


def test_every_field_separates_expansions(parameters: ParameterSet) -> None:
    seed = bytes(32)
    rows = [
        UniformExpander(parameters, b"s").expand([1], seed),
        UniformExpander(parameters, b"t").expand([1], seed),
        UniformExpander(parameters, b"s").expand([2], seed),
        UniformExpander(parameters, b"s").expand([1], bytes(31) + b"\1"),
        UniformExpander(parameters, b"s", public_key=True).expand([1], seed),
    ]
    polynomials = [tuple(row[0, i, :8].tolist()) for row in rows for i in range(3)]
    assert len(set(polynomials)) == len(polynomials)


def test_uniform_residues_are_uniform(parameters: ParameterSet) -> None:
    residues = UniformExpander(parameters, b"s").expand([1, 2, 3, 4], bytes(range(128)))
    counts = np.bincount((residues >> 22).reshape(-1), minlength=256)
    expected = counts.sum() / 256
    assert np.sum((counts - expected) ** 2 / expected) < 400  # 255 degrees of freedom: beyond six sigma


def test_ternary_values_are_uniform_and_the_reference_digits() -> None:
    stream = SecretStream("test")
    trits = stream.ternary(30, 4096)
    assert stream.ternary(2, 8192).shape == (2, 8192)
    counts = np.bincount(trits.reshape(-1), minlength=3)
    expected = trits.size / 3
    assert counts.size == 3
    assert np.sum((counts - expected) ** 2 / expected) < 40
    # Each digit place on its own, and neighbouring places together.
    for place in range(5):
        part = trits[:, place * 820 : min((place + 1) * 820, 4096)]
        share = np.bincount(part.reshape(-1), minlength=3)
        assert np.sum((share - part.size / 3) ** 2 / (part.size / 3)) < 40
    together = np.bincount((trits[:, :816] * 3 + trits[:, 820:1636]).reshape(-1), minlength=9)
    assert np.sum((together - together.sum() / 9) ** 2 / (together.sum() / 9)) < 60

    data = np.frombuffer(bytes(range(256)) * 4, np.uint8)
    rows = np.empty((1, 4096), np.uint8)
    assert kernels.accept_ternary(data[None], np.empty(1024, np.uint8), rows) == 1
    (output,) = rows
    accepted = [value for value in data.tolist() if value < 243][:820]
    assert output.tolist() == [value // 3**digit % 3 for digit in range(5) for value in accepted][:4096]


def test_too_few_ternary_bytes_are_reported() -> None:
    data = np.zeros((3, 1024), np.uint8)
    data[1] = 250
    rows = np.full((3, 4096), 9, np.uint8)
    assert kernels.accept_ternary(data, np.empty(1024, np.uint8), rows) == 1
    assert (rows[0] == 0).all()
    assert (rows[1:] == 9).all()


def test_errors_are_centred_binomial_and_match_the_reference() -> None:
    words = SecretStream("test").words(40, kernels.error_words(4096))
    values = np.empty((40, 3 * kernels.error_words(4096) // 2), np.int32)
    for row in range(40):
        kernels.centred_binomial(words[row], values[row])
        assert values[row, :4096].tolist() == reference.errors(words[row], 4096)
    sample = values[:, :4096]
    assert abs(sample.mean()) < 6 * np.sqrt(10.5 / sample.size)
    assert abs(sample.var() - 10.5) < 6 * 10.5 * np.sqrt(2 / sample.size)
    for third in (sample[:, :1366], sample[:, 1366:2732], sample[:, 2732:]):
        assert abs(third.var() - 10.5) < 6 * 10.5 * np.sqrt(2 / third.size)
    from math import comb

    counts = np.bincount((sample + 21).reshape(-1), minlength=43)
    expected = np.array([comb(42, k) for k in range(43)]) / 2**42 * sample.size
    bulk = expected > 20
    assert np.sum((counts[bulk] - expected[bulk]) ** 2 / expected[bulk]) < 90  # about 26 degrees of freedom


@pytest.mark.parametrize("bits", [64, 65, 97, 112, 120])
def test_the_flood_is_the_sum_of_four_signed_integers(bits: int) -> None:
    parameters = dataclasses.replace(get_parameter_set("n8192-q150-w12"), flood_bits=bits)
    constants = ring(parameters)
    words = SecretStream("test").words(3000, 4, kernels.flood_limbs(bits))
    words[0] = 0
    words[1] = np.uint64(2**64 - 1)
    words[2] = 0
    words[2, :, -1] = np.uint64(2**63)
    residues = np.empty((3000, 5), np.uint32)
    kernels.flood(words, residues, -bits % 64, constants.constants, constants.flood_offset, constants.primes)
    exact = [reference.flood(row, bits) for row in words]
    assert exact[:3] == [-(2 ** (bits + 1)), 2 ** (bits + 1) - 4, 0]
    assert residues.tolist() == [[value % p for p in parameters.primes] for value in exact]
    deviation = np.array([value / 2**bits for value in exact[3:]])
    assert abs(deviation.mean()) < 6 / np.sqrt(3 * len(deviation))
    assert abs(deviation.var() - 1 / 3) < 6 * np.sqrt(2 / len(deviation)) / 3


def test_secret_streams_never_repeat_and_show_nothing() -> None:
    first, second = SecretStream("test"), SecretStream("test")
    assert first.words(4).tolist() != second.words(4).tolist()
    assert first.words(4).tolist() != first.words(4).tolist()
    assert repr(first) == "SecretStream()"
