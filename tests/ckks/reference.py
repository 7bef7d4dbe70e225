"""The engine's arithmetic once more, slowly and from the definitions: Python integers and plain numpy.

Shares no code with tensorguard.ckks but the parameter set and the plan.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from tensorguard.ckks import ParameterSet, Plan


def reverse6(value: int) -> int:
    return int(f"{value:06b}"[::-1], 2)


@cache
def exponents(degree: int) -> np.ndarray:
    """Position n of the transform domain holds the value at psi ** exponents(N)[n]."""
    within = [64 * reverse6(n >> 6) + reverse6(n & 63) for n in range(4096)]
    halves = degree // 4096
    return np.array([2 * (halves * place + half) + 1 for half in range(halves) for place in within])


@lru_cache
def root(prime: int, degree: int) -> int:
    order = 2 * degree
    return next(
        psi for g in range(2, prime) if pow(psi := pow(g, (prime - 1) // order, prime), degree, prime) == prime - 1
    )


def transform_by_definition(polynomial: np.ndarray, prime: int) -> np.ndarray:
    """Horner's rule at every point."""
    psi = root(prime, len(polynomial))
    points = np.array([pow(psi, int(exponent), prime) for exponent in exponents(len(polynomial))], np.uint64)
    values = np.zeros(len(polynomial), np.uint64)
    for coefficient in polynomial[::-1].tolist():
        values = (values * points + np.uint64(coefficient)) % np.uint64(prime)
    return values


@cache
def _powers(base: int, count: int, prime: int) -> np.ndarray:
    powers = [1]
    while len(powers) < count:
        powers.append(powers[-1] * base % prime)
    return np.array(powers, np.uint64)


def _dft(values: np.ndarray, generator: int, prime: int) -> np.ndarray:
    size = values.shape[-1]
    if size == 1:
        return values
    even = _dft(values[..., ::2], generator * generator % prime, prime)
    odd = _dft(values[..., 1::2], generator * generator % prime, prime)
    product = odd * _powers(generator, size // 2, prime) % np.uint64(prime)
    return np.concatenate([even + product, even + np.uint64(prime) - product], axis=-1) % np.uint64(prime)


def transform(polynomials: np.ndarray, prime: int) -> np.ndarray:
    """[..., N] coefficients to the transform domain: twist by psi**k, then a textbook recursive DFT."""
    degree = polynomials.shape[-1]
    psi = root(prime, degree)
    twist = _powers(psi, degree, prime)
    values = _dft(polynomials.astype(np.uint64) % np.uint64(prime) * twist % np.uint64(prime), psi * psi % prime, prime)
    return values[..., (exponents(degree) - 1) // 2]


def inverse(values: np.ndarray, prime: int) -> np.ndarray:
    degree = values.shape[-1]
    psi = root(prime, degree)
    ordered = np.empty_like(values, np.uint64)
    ordered[..., (exponents(degree) - 1) // 2] = values
    coefficients = _dft(ordered, pow(psi, -2, prime), prime)
    untwist = _powers(pow(psi, -1, prime), degree, prime) * np.uint64(pow(degree, -1, prime)) % np.uint64(prime)
    return coefficients * untwist % np.uint64(prime)


def combine(residues: np.ndarray, primes: tuple[int, ...]) -> list[int]:
    """Chinese remainders: [primes, N] to integers in [0, q)."""
    q = int(np.prod([int(p) for p in primes], dtype=object))
    weights = [q // p * pow(q // p, -1, p) for p in primes]
    return [sum(int(r) * w for r, w in zip(column, weights, strict=True)) % q for column in residues.T]


def negacyclic(a: list[int], b: list[int], modulus: int) -> list[int]:
    """a·b mod (X^N + 1, modulus), through one product of big integers."""
    degree, width = len(a), (2 * modulus.bit_length() + 16 + 7) // 8

    def pack(values: list[int]) -> int:
        return int.from_bytes(b"".join((v % modulus).to_bytes(width, "little") for v in values), "little")

    raw = (pack(a) * pack(b)).to_bytes(2 * degree * width, "little")
    full = [int.from_bytes(raw[i * width : (i + 1) * width], "little") for i in range(2 * degree)]
    return [(low - high) % modulus for low, high in zip(full[:degree], full[degree:], strict=True)]


def centre(value: int, modulus: int) -> int:
    value %= modulus
    return value - modulus if value > modulus // 2 else value


def switch(value: int, primes: tuple[int, ...]) -> int:
    """Divide by every prime but the first, the last one first, each time after subtracting the centred remainder."""
    for prime in primes[:0:-1]:
        value = (value - centre(value, prime)) // prime
    return value % primes[0]


def encode_activations(mantissas: np.ndarray, plan: Plan, chunk: int, block: int, degree: int) -> list[int]:
    """Plaintext m of one ciphertext, before the scale."""
    message = [0] * degree
    tokens, channels = mantissas.shape
    for t in range(min(plan.tokens, tokens - chunk * plan.tokens)):
        for i in range(min(plan.channels, channels - block * plan.channels)):
            message[plan.tokens * i + t] = int(mantissas[chunk * plan.tokens + t, block * plan.channels + i])
    return message


def encode_weights(integers: np.ndarray, plan: Plan, group: int, block: int, degree: int) -> list[int]:
    polynomial = [0] * degree
    rows, channels = integers.shape
    for j in range(min(plan.rows, rows - group * plan.rows)):
        for i in range(min(plan.channels, channels - block * plan.channels)):
            at = plan.tokens * (j * plan.channels + plan.channels - 1 - i)
            polynomial[at] = int(integers[group * plan.rows + j, block * plan.channels + i])
    return polynomial


def wanted(plan: Plan, token: int, row: int) -> int:
    return plan.tokens * (row * plan.channels + plan.channels - 1) + token


def errors(words: np.ndarray, degree: int) -> list[int]:
    """Centred binomial values of one polynomial from its 64-bit words."""
    half = len(words) // 2
    first, second = [int(w) for w in words[:half]], [int(w) for w in words[half:]]
    low = (1 << 42) - 1
    values = [(w & low).bit_count() for w in first] + [(w & low).bit_count() for w in second]
    values += [(a >> 43).bit_count() + (b >> 43).bit_count() for a, b in zip(first, second, strict=True)]
    return [value - 21 for value in values[:degree]]


def flood(words: np.ndarray, flood_bits: int) -> int:
    """The sum of four signed integers of ``flood_bits`` bits, from uint64 [4, limbs], least significant limb first.

    Of the last limb the high bits count.
    """
    limbs = words.shape[1]
    spare = 64 * limbs - flood_bits
    total = 0
    for row in words.tolist():
        row[-1] >>= spare
        total += sum(limb << (64 * k) for k, limb in enumerate(row)) - (1 << (flood_bits - 1))
    return total


def key_stream(key: bytes, prime_index: int, size: int) -> bytes:
    nonce = bytes(4) + prime_index.to_bytes(4, "little") + bytes(8)
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def expand(
    parameters: ParameterSet,
    label: bytes,
    session_id: bytes,
    identifier: int,
    seed: bytes,
    primes: tuple[int, ...] | None = None,
) -> np.ndarray:
    text = b"".join(len(f).to_bytes(4, "little") + f for f in (label, parameters.name.encode(), session_id))
    key = hashlib.sha3_256(text + identifier.to_bytes(8, "little") + seed).digest()
    rows = []
    for index, prime in enumerate(primes or parameters.primes):
        degree = parameters.degree
        stream = np.frombuffer(key_stream(key, index, 16 * degree), "<u4") & np.uint32(2**30 - 1)
        rows.append(stream[stream < prime][:degree])
    return np.stack(rows)


CIPHERTEXT = b"tensafe/ckks/v1/ciphertext"
PUBLIC_KEY = b"tensafe/ckks/v1/public-key"
