"""The negacyclic number-theoretic transform of degree 4096, forward, inverse and pruned inverse.

Longa and Naehrig ("Speeding up the number theoretic transform", 2016) with Harvey's lazy reduction, four
passes of
three stages each. Between the second and third pass the 64x64 matrix of coefficients is transposed, so
that every
pass works on contiguous lanes; it is not transposed back. Position n = 64 c + r of the transform domain
holds the value at ψ^(2 (64 rev(c) + rev(r)) + 1), where rev reverses six bits and ψ is `primitive_root`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numba import njit

from tensorguard.ckks.simd import (
    forward_block,
    forward_lanes,
    inverse_block,
    inverse_block_scaled,
    inverse_lanes,
    transpose_tile,
)

DEGREE = 4096
SIDE = 64

FORWARD, INVERSE, PRUNED = range(3)
"""First axis of a prime's tables; the second is (factor, its Shoup quotient)."""


def primitive_root(prime: int, degree: int = DEGREE) -> int:
    """ψ: g^((p-1)/2N) for the smallest g >= 2 that gives ψ^N = -1, a primitive 2N-th root of unity."""
    for g in range(2, prime):
        root = pow(g, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            return root
    raise ValueError(f"{prime} has no primitive root of order {2 * degree}")


def shoup(factors: npt.NDArray[np.uint32], prime: int) -> npt.NDArray[np.uint32]:
    """floor(factor * 2**32 / p) for each factor below p. Used on public constants and, once per key, on
    the key.
    """
    return ((factors.astype(np.uint64) << np.uint64(32)) // np.uint64(prime)).astype(np.uint32)


def _powers(root: int, prime: int) -> npt.NDArray[np.uint32]:
    """root^bitreverse(k) for k < N."""
    powers = np.empty(DEGREE, np.uint64)
    power = 1
    for exponent in range(DEGREE):
        powers[exponent] = power
        power = power * root % prime
    reversed_index = np.zeros(DEGREE, np.int64)
    for bit in range(12):
        reversed_index |= (np.arange(DEGREE) >> bit & 1) << (11 - bit)
    return powers[reversed_index].astype(np.uint32)


def _in_pass_order(roots: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The factors in the order the four passes read them: 1 + 7, 8 x 7, 7 x 64 lanes, 8 x 7 x 64 lanes."""
    lane = np.arange(SIDE)
    ordered = [roots[:8]]
    ordered += [roots[[m * 8 + m * b + h for m in (1, 2, 4) for h in range(m)]] for b in range(8)]
    ordered += [roots[64 * m + m * lane + h] for m in (1, 2, 4) for h in range(m)]
    ordered += [
        roots[m * 512 + m * (8 * lane + b) + h] for b in range(8) for m in (1, 2, 4) for h in range(m)
    ]
    return np.concatenate(ordered)


def _in_pruned_order(roots: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Row stages with H pairs at 64 H, as [pair][lane]; the stages between lanes in [0, 64)."""
    ordered = roots.copy()
    for pairs in (1, 2, 4, 8, 16, 32):
        lane, pair = np.arange(SIDE)[None, :], np.arange(pairs)[:, None]
        ordered[64 * pairs : 128 * pairs] = roots[64 * pairs + lane * pairs + pair].reshape(-1)
    return ordered


@lru_cache(maxsize=8)
def tables(primes: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """uint32 [primes, 3, 2, 4096]: for each prime the factors of `FORWARD`, `INVERSE` and `PRUNED`,
    read-only.
    """
    result = np.empty((len(primes), 3, 2, DEGREE), np.uint32)
    for index, prime in enumerate(primes):
        root = primitive_root(prime)
        inverse_roots = _powers(pow(root, -1, prime), prime)
        # The last inverse stage also divides by N: one output is scaled, the other's factor includes it.
        scale = pow(DEGREE, -1, prime)
        inverse_roots[1] = int(inverse_roots[1]) * scale % prime
        inverse_roots[0] = scale
        result[index, FORWARD, 0] = _in_pass_order(_powers(root, prime))
        result[index, INVERSE, 0] = _in_pass_order(inverse_roots)
        result[index, PRUNED, 0] = _in_pruned_order(inverse_roots)
        result[index, :, 1] = shoup(result[index, :, 0], prime)
    result.flags.writeable = False
    return result


@njit(cache=True, nogil=True, forceinline=True)
def multiply_shoup(value, factor, factor_shoup, prime):  # type: ignore[no-untyped-def]
    """value * factor mod prime in [0, 2 prime), for any uint32 value."""
    quotient = np.uint32((np.uint64(value) * np.uint64(factor_shoup)) >> np.uint64(32))
    return np.uint32(np.uint32(value * factor) - np.uint32(quotient * prime))


@njit(cache=True, nogil=True, forceinline=True)
def reduce_once(value, modulus):  # type: ignore[no-untyped-def]
    """value - modulus if that is not negative, else value; a minimum of unsigned integers, no branch."""
    return min(value, np.uint32(value - modulus))


@njit(cache=True, nogil=True, forceinline=True)
def forward(source, target, factors, prime):  # type: ignore[no-untyped-def]
    """Transform ``source`` (uint32 [4096], below 4p, overwritten) into ``target`` (below 4p)."""
    value, quotient = factors[FORWARD, 0], factors[FORWARD, 1]
    for j in range(0, 512, 16):
        forward_block(source, j, 512, value, quotient, 1, prime)
    for block in range(8):
        for j in range(0, 64, 16):
            forward_block(source, 512 * block + j, 64, value, quotient, 8 + 7 * block, prime)
    for i in range(0, 64, 16):
        for j in range(0, 64, 16):
            transpose_tile(source, 64 * i + j, target, 64 * j + i, 64)
    for row in range(0, 512, 64):
        for j in range(0, 64, 16):
            forward_lanes(target, row + j, 512, value, quotient, 64 + j, prime)
    for block in range(8):
        for j in range(0, 64, 16):
            forward_lanes(target, 512 * block + j, 64, value, quotient, 512 + 448 * block + j, prime)


@njit(cache=True, nogil=True, forceinline=True)
def inverse(source, target, factors, prime):  # type: ignore[no-untyped-def]
    """Inverse transform of ``source`` (uint32 [4096], below 2p, overwritten) into ``target`` (below 2p)."""
    value, quotient = factors[INVERSE, 0], factors[INVERSE, 1]
    for block in range(8):
        for j in range(0, 64, 16):
            inverse_lanes(source, 512 * block + j, 64, value, quotient, 512 + 448 * block + j, prime)
    for row in range(0, 512, 64):
        for j in range(0, 64, 16):
            inverse_lanes(source, row + j, 512, value, quotient, 64 + j, prime)
    for i in range(0, 64, 16):
        for j in range(0, 64, 16):
            transpose_tile(source, 64 * i + j, target, 64 * j + i, 64)
    for block in range(8):
        for j in range(0, 64, 16):
            inverse_block(target, 512 * block + j, 64, value, quotient, 8 + 7 * block, prime)
    for j in range(0, 512, 16):
        inverse_block_scaled(target, j, 512, value, quotient, 1, prime)


@njit(cache=True, nogil=True, forceinline=True)
def inverse_pruned(values, skip, factors, prime):  # type: ignore[no-untyped-def]
    """Only the coefficients k with k mod 2**skip = 2**skip - 1 of the inverse transform, in place.

    Of the first ``skip`` inverse stages only the differences are needed. Coefficient k ends, below 2p, at
    ``values[pruned_position(k, skip)]``. Input below 2p.
    """
    value, quotient = factors[PRUNED, 0], factors[PRUNED, 1]
    double = np.uint32(2 * prime)
    pairs = SIDE // 2
    for stage in range(6):
        at = 64 * pairs
        if stage < skip:
            for pair in range(pairs):
                kept = values[64 * pair : 64 * pair + 64]
                first, second = (
                    values[128 * pair : 128 * pair + 64],
                    values[128 * pair + 64 : 128 * pair + 128],
                )
                for lane in range(64):
                    difference = np.uint32(np.uint32(first[lane] - second[lane]) + double)
                    kept[lane] = multiply_shoup(
                        difference, value[at + 64 * pair + lane], quotient[at + 64 * pair + lane], prime
                    )
        else:
            # Rows of one pair are as far apart as the stages done since the last skipped one.
            distance = 1 << (stage - skip)
            for pair in range(pairs):
                for offset in range(distance):
                    upper = (2 * pair * distance + offset) * 64
                    first = values[upper : upper + 64]
                    second = values[upper + 64 * distance : upper + 64 * distance + 64]
                    for lane in range(64):
                        a, b = first[lane], second[lane]
                        first[lane] = reduce_once(np.uint32(a + b), double)
                        second[lane] = multiply_shoup(
                            np.uint32(np.uint32(a - b) + double),
                            value[at + 64 * pair + lane],
                            quotient[at + 64 * pair + lane],
                            prime,
                        )
        pairs >>= 1
    rows = max(SIDE >> skip, 1)
    for row in range(rows):
        line = values[64 * row : 64 * row + 64]
        distance = 1
        pairs = SIDE // 2
        for stage in range(6, 12):
            if stage < skip:
                for pair in range(pairs):
                    difference = np.uint32(np.uint32(line[2 * pair] - line[2 * pair + 1]) + double)
                    line[pair] = multiply_shoup(
                        difference, value[pairs + pair], quotient[pairs + pair], prime
                    )
            else:
                for pair in range(pairs):
                    factor, factor_shoup = value[pairs + pair], quotient[pairs + pair]
                    for offset in range(distance):
                        upper = 2 * pair * distance + offset
                        a, b = line[upper], line[upper + distance]
                        total = reduce_once(np.uint32(a + b), double)
                        if stage == 11:
                            total = multiply_shoup(total, value[0], quotient[0], prime)
                        line[upper] = total
                        line[upper + distance] = multiply_shoup(
                            np.uint32(np.uint32(a - b) + double), factor, factor_shoup, prime
                        )
                distance *= 2
            pairs >>= 1


@njit(cache=True, nogil=True, forceinline=True)
def pruned_position(coefficient, skip):  # type: ignore[no-untyped-def]
    """Where `inverse_pruned` leaves this coefficient."""
    if skip >= 6:
        return coefficient >> skip
    return ((coefficient & 63) >> skip) * 64 + (coefficient >> 6)


@njit(cache=True, nogil=True)
def forward_all(polynomials, target, factors, primes):  # type: ignore[no-untyped-def]
    """Transform uint32 [n, primes, 4096] below 4p (overwritten) into ``target``, fully reduced."""
    for index in range(polynomials.shape[0]):
        for i in range(primes.shape[0]):
            prime = primes[i]
            output = target[index, i]
            forward(polynomials[index, i], output, factors[i], prime)
            for n in range(DEGREE):
                output[n] = reduce_once(reduce_once(output[n], np.uint32(2 * prime)), prime)


@njit(cache=True, nogil=True)
def inverse_all(polynomials, target, factors, primes):  # type: ignore[no-untyped-def]
    """Inverse of `forward_all`: uint32 [n, primes, 4096] below 2p (overwritten) into ``target``, fully
    reduced.
    """
    for index in range(polynomials.shape[0]):
        for i in range(primes.shape[0]):
            output = target[index, i]
            inverse(polynomials[index, i], output, factors[i], primes[i])
            for n in range(DEGREE):
                output[n] = reduce_once(output[n], primes[i])
