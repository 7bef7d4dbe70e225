"""Compiled sampling: public expansion of seeds, ternary and centred binomial polynomials, floods."""

# numba compiles these from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np

from tensorguard.ckks.chacha20 import chacha20_words
from tensorguard.ckks.compiled import kernel
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.ntt import multiply_shoup, reduce_once
from tensorguard.ckks.pointwise import count_ones, move

ERROR_HALF_WIDTH = 21
"""Centred binomial: the sum of 42 fair bits minus 21, variance 10.5."""
TERNARY_VALUES_PER_BYTE = 5
FLOOD_TERMS = 4


def error_words(degree: int) -> int:
    """64-bit words of randomness for one error polynomial: two words make three values."""
    return 2 * -(-degree // 3)


def error_values(degree: int) -> int:
    """Length of an array that `centred_binomial` fills for this degree: a little over it, in whole cache lines."""
    return -(-3 * -(-degree // 3) // LANES) * LANES


def flood_limbs(flood_bits: int) -> int:
    """64-bit words of randomness for each of the four terms of a flood."""
    return -(-flood_bits // 64)


@kernel
def expand_polynomial(key, i, prime, words, residues):
    """Residues uint32 [N] modulo prime number ``i`` from a ChaCha20 key uint32 [8]: in order, the low 30 bits of the
    words of the stream with nonce i that are below the prime. Public values only. ``words`` is scratch [256].
    """
    mask = np.uint32(0x3FFFFFFF)
    wanted, nonce = residues.shape[0], np.uint32(i)
    for n in range(0, wanted, 256):
        chacha20_words(key, nonce, np.uint32(n // 16), residues, n)
    largest = np.uint32(0)
    for n in range(wanted):
        value = residues[n] & mask
        residues[n] = value
        largest = max(largest, value)
    if largest < prime:
        return
    # Few are not: whole lines move at once, down to where the rejected ones left room.
    accepted = 0
    for start in range(0, wanted, LANES):
        largest = np.uint32(0)
        for n in range(LANES):
            largest = max(largest, residues[start + n])
        if largest < prime:
            move(residues, start, accepted)
            accepted += LANES
        else:
            for n in range(start, start + LANES):
                value = residues[n]
                if value < prime:
                    residues[accepted] = value
                    accepted += 1
    block = wanted // 16
    while accepted < wanted:
        chacha20_words(key, nonce, np.uint32(block), words, 0)
        block += 16
        for n in range(256):
            value = words[n] & mask
            if value < prime and accepted < wanted:
                residues[accepted] = value
                accepted += 1


@kernel
def expand(keys, primes, words, residues):
    """`expand_polynomial` for all primes and keys uint32 [n, 8], into uint32 [n, primes, N]."""
    for index in range(keys.shape[0]):
        for i in range(primes.shape[0]):
            expand_polynomial(keys[index], i, primes[i], words, residues[index, i])


@kernel
def accept_ternary(random_bytes, accepted, trits):
    """Fill rows of uint8 [n, N] ``trits`` with uniform 0, 1, 2: bytes below 243 of uint8 [n, bytes] hold five base-3
    digits each.

    Rejected bytes are independent of the accepted ones, and both take the same time. Returns the number of rows that
    are filled: the next one's bytes were too few. ``accepted`` is scratch of at least as many bytes as a row.
    """
    degree = trits.shape[1]
    groups = (degree + TERNARY_VALUES_PER_BYTE - 1) // TERNARY_VALUES_PER_BYTE
    for row in range(trits.shape[0]):
        drawn, output = random_bytes[row], trits[row]
        count = 0
        for n in range(drawn.shape[0]):
            value = drawn[n]
            accepted[count] = value
            count += np.int64(value < 243)
        if count < groups:
            return row
        for digit in range(TERNARY_VALUES_PER_BYTE):
            start = digit * groups
            for n in range(min(groups, degree - start)):
                quotient = np.uint8((np.uint32(accepted[n]) * np.uint32(171)) >> np.uint32(9))  # floor(value / 3)
                output[start + n] = np.uint8(accepted[n] - np.uint8(3) * quotient)
                accepted[n] = quotient
            # The last digit needs no further quotient.
    return trits.shape[0]


@kernel
def centred_binomial(words, errors):
    """int32 values of variance 10.5, three from two uint64 ``words``: 42 bits a value, 126 of 128 bits used."""
    low = np.uint64((1 << 42) - 1)
    shift = np.uint64(43)
    half = np.int32(ERROR_HALF_WIDTH)
    group = words.shape[0] // 2
    for n in range(group):
        first, second = words[n], words[group + n]
        errors[n] = np.int32(count_ones(first & low)) - half
        errors[group + n] = np.int32(count_ones(second & low)) - half
        errors[2 * group + n] = np.int32(count_ones(first >> shift) + count_ones(second >> shift)) - half


@kernel
def flood(words, residues, spare_bits, constants, flood_offset, primes):
    """Residues uint32 [n, primes] of the sum of four uniform signed integers, from uint64 [n, 4, limbs].

    Each is read from its words, the least significant first, without the lowest ``spare_bits`` of the last word.
    Minus half its range it would be signed; ``flood_offset[i]`` is -4 times that half mod p.
    """
    limbs = words.shape[2]
    for n in range(words.shape[0]):
        for i in range(primes.shape[0]):
            prime = primes[i]
            double = np.uint32(2 * prime)
            word, word_shoup, unit_shoup = constants[i, 1], constants[i, 2], constants[i, 3]
            total = flood_offset[i]
            for k in range(FLOOD_TERMS):
                term = np.uint32(0)
                for limb in range(limbs - 1, -1, -1):
                    value = words[n, k, limb] >> (np.uint64(spare_bits) if limb == limbs - 1 else np.uint64(0))
                    for shift in (np.uint64(32), np.uint64(0)):
                        part = multiply_shoup(
                            np.uint32((value >> shift) & np.uint64(0xFFFFFFFF)), np.uint32(1), unit_shoup, prime
                        )
                        term = reduce_once(np.uint32(multiply_shoup(term, word, word_shoup, prime) + part), double)
                total = reduce_once(np.uint32(total + term), double)
            residues[n, i] = reduce_once(total, prime)
