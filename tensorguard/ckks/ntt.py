"""The negacyclic number-theoretic transform of degree 4096 or 8192, forward, inverse and pruned inverse.

Longa and Naehrig ("Speeding up the number theoretic transform", 2016) with Harvey's lazy reduction, four
passes of three stages each. Between the second and third pass the 64x64 matrix of coefficients is transposed,
so that every pass works on contiguous lanes; it is not transposed back. Position n = 64 c + r of the
transform domain holds the value at ψ^(2 (64 rev(c) + rev(r)) + 1), where rev reverses six bits and ψ is
`primitive_root`.

Degree 8192 is one butterfly stage that splits X^8192 + 1 into X^4096 - ψ^4096 and X^4096 + ψ^4096, and then
the same four passes on each half h with tables of its own: position 4096 h + n holds the value at
ψ^(2 (2 (64 rev(c) + rev(r)) + h) + 1).
"""

# numba compiles the kernels from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.arrays import aligned_empty
from tensorguard.ckks.compiled import inlined, kernel
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.simd import (
    forward_block,
    forward_lanes,
    inverse_block,
    inverse_block_scaled,
    inverse_difference,
    inverse_difference_lanes,
    inverse_lanes,
    inverse_pair,
    inverse_pair_lanes,
    split_pair,
    transpose_tile,
)

HALF = 4096
"""Degree of one transform of four passes; a ring of degree 8192 has two halves."""
SIDE = 64

FORWARD, INVERSE, PRUNED = range(3)
"""Axis of the tables of one half; the next is (factor, its Shoup quotient). Entry 0 of FORWARD belongs to no pass: at
degree 8192 it holds the factor of the splitting stage, in the first half that of the forward, in the second that of the
inverse transform.
"""


def primitive_root(prime: int, degree: int) -> int:
    """ψ: g^((p-1)/2N) for the smallest g >= 2 that gives ψ^N = -1, a primitive 2N-th root of unity."""
    for g in range(2, prime):
        root = pow(g, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            return root
    raise ValueError(f"{prime} has no primitive root of order {2 * degree}")


def shoup(factors: npt.NDArray[np.uint32], prime: int) -> npt.NDArray[np.uint32]:
    """floor(factor * 2**32 / p) for each factor below p. Used on public constants and, once per key, on the
    key.
    """
    return ((factors.astype(np.uint64) << np.uint64(32)) // np.uint64(prime)).astype(np.uint32)


def _powers(root: int, prime: int, degree: int) -> npt.NDArray[np.uint32]:
    """root^bitreverse(k) for k < N."""
    powers = np.empty(degree, np.uint64)
    power = 1
    for exponent in range(degree):
        powers[exponent] = power
        power = power * root % prime
    reversed_index = np.zeros(degree, np.int64)
    bits = degree.bit_length() - 1
    for bit in range(bits):
        reversed_index |= (np.arange(degree) >> bit & 1) << (bits - 1 - bit)
    return powers[reversed_index].astype(np.uint32)


def _half(roots: npt.NDArray[np.uint32], half: int) -> npt.NDArray[np.uint32]:
    """The factors below node 2 + half of the binary tree that ``roots`` lists level by level, listed likewise."""
    part = np.empty(HALF, np.uint32)
    for level in range(12):
        nodes = 1 << level
        part[nodes : 2 * nodes] = roots[nodes * (2 + half) : nodes * (3 + half)]
    part[0] = roots[0]
    return part


def _in_pass_order(roots: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The factors in the order the four passes read them: 1 + 7, 8 x 7, 7 x 64 lanes, 8 x 7 x 64 lanes."""
    lane = np.arange(SIDE)
    ordered = [roots[:8]]
    ordered += [roots[[m * 8 + m * b + h for m in (1, 2, 4) for h in range(m)]] for b in range(8)]
    ordered += [roots[64 * m + m * lane + h] for m in (1, 2, 4) for h in range(m)]
    ordered += [roots[m * 512 + m * (8 * lane + b) + h] for b in range(8) for m in (1, 2, 4) for h in range(m)]
    return np.concatenate(ordered)


def _in_pruned_order(roots: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Row stages with H pairs at 64 H, as [pair][lane]; the stages between lanes in [0, 64)."""
    ordered = roots.copy()
    for pairs in (1, 2, 4, 8, 16, 32):
        lane, pair = np.arange(SIDE)[None, :], np.arange(pairs)[:, None]
        ordered[64 * pairs : 128 * pairs] = roots[64 * pairs + lane * pairs + pair].reshape(-1)
    return ordered


@lru_cache(maxsize=8)
def tables(primes: tuple[int, ...], degree: int) -> npt.NDArray[np.uint32]:
    """uint32 [primes, N / 4096, 3, 2, 4096]: for each prime and half the factors of `FORWARD`, `INVERSE` and
    `PRUNED`, read-only.
    """
    halves = degree // HALF
    result = aligned_empty(len(primes), halves, 3, 2, HALF)
    for index, prime in enumerate(primes):
        root = primitive_root(prime, degree)
        both = (_powers(root, prime, degree), _powers(pow(root, -1, prime), prime, degree))
        for half in range(halves):
            roots, inverse_roots = (_half(roots, half) if halves == 2 else roots for roots in both)
            # The last inverse stage of a half also divides by N: one output is scaled, the other's factor includes it.
            scale = pow(degree, -1, prime)
            inverse_roots[1] = int(inverse_roots[1]) * scale % prime
            inverse_roots[0] = scale
            roots[0] = both[half][1]
            result[index, half, FORWARD, 0] = _in_pass_order(roots)
            result[index, half, INVERSE, 0] = _in_pass_order(inverse_roots)
            result[index, half, PRUNED, 0] = _in_pruned_order(inverse_roots)
        result[index, :, :, 1] = shoup(result[index, :, :, 0], prime)
    result.flags.writeable = False
    return result


@inlined
def multiply_shoup(value, factor, factor_shoup, prime):
    """value * factor mod prime in [0, 2 prime), for any uint32 value."""
    quotient = np.uint32((np.uint64(value) * np.uint64(factor_shoup)) >> np.uint64(32))
    return np.uint32(np.uint32(value * factor) - np.uint32(quotient * prime))


@inlined
def reduce_once(value, modulus):
    """value - modulus if that is not negative, else value; a minimum of unsigned integers, no branch."""
    return min(value, np.uint32(value - modulus))


@kernel
def _forward_half(source, target, factors, prime):
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


@kernel
def forward(source, target, factors, prime):
    """Transform ``source`` (uint32 [N], below 4p, overwritten) into ``target`` (below 4p)."""
    halves = factors.shape[0]
    if halves == 2:
        for n in range(0, HALF, LANES):
            split_pair(source, n, HALF + n, factors[0, FORWARD, 0], factors[0, FORWARD, 1], 0, prime)
    for half in range(halves):
        start, end = half * HALF, (half + 1) * HALF
        _forward_half(source[start:end], target[start:end], factors[half], prime)


@kernel
def _inverse_half(source, target, factors, prime):
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


@inlined
def _join(values, count, factors, prime):
    """The last inverse stage at degree 8192: in place on the first ``count`` values of both halves, below 2p."""
    for n in range(0, count, LANES):
        inverse_pair(values, n, HALF + n, HALF + n, factors[1, FORWARD, 0], factors[1, FORWARD, 1], 0, prime)


@kernel
def inverse(source, target, factors, prime):
    """Inverse transform of ``source`` (uint32 [N], below 2p, overwritten) into ``target`` (below 2p)."""
    halves = factors.shape[0]
    for half in range(halves):
        start, end = half * HALF, (half + 1) * HALF
        _inverse_half(source[start:end], target[start:end], factors[half], prime)
    if halves == 2:
        _join(target, HALF, factors, prime)


@kernel
def _row_stage(values, pairs, distance, full, value, quotient, prime):
    """One inverse stage between rows of 64; in place. A pair's halves have ``distance`` rows each.

    A stage that is not full keeps the differences only and closes up. Factors differ between lanes.
    """
    for pair in range(pairs):
        for offset in range(distance):
            for base in range(0, 64, LANES):
                first = 64 * (2 * pair * distance + offset) + base
                second = first + 64 * distance
                at = 64 * (pairs + pair) + base
                if full:
                    inverse_pair_lanes(values, first, second, second, value, quotient, at, prime)
                else:
                    kept = 64 * (pair * distance + offset) + base
                    inverse_difference_lanes(values, first, second, kept, value, quotient, at, prime)


@kernel
def _column_stage(values, pairs, distance, width, full, value, quotient, prime):
    """The same with one factor for all lanes, of which the first ``width`` count."""
    for pair in range(pairs):
        for offset in range(distance):
            for base in range(0, width, LANES):
                first = 64 * (2 * pair * distance + offset) + base
                second = first + 64 * distance
                if full:
                    inverse_pair(values, first, second, second, value, quotient, pairs + pair, prime)
                else:
                    kept = 64 * (pair * distance + offset) + base
                    inverse_difference(values, first, second, kept, value, quotient, pairs + pair, prime)


@kernel
def _inverse_pruned_half(source, target, keep, skip, factors, prime):
    value, quotient = factors[PRUNED, 0], factors[PRUNED, 1]
    first_stage, pairs, distance = 0, SIDE // 2, 1
    if keep >= 3:
        for block in range(8):
            for j in range(0, 64, LANES):
                at = 512 + 448 * block + j
                inverse_lanes(source, 512 * block + j, 64, factors[INVERSE, 0], factors[INVERSE, 1], at, prime)
        first_stage, pairs, distance = 3, 4, 8
    for stage in range(first_stage, 6):
        full = stage < keep or stage >= keep + skip
        _row_stage(source, pairs, distance, full, value, quotient, prime)
        distance *= 2 if full else 1
        pairs >>= 1
    width = distance
    for i in range(0, width, LANES):
        for j in range(0, 64, LANES):
            transpose_tile(source, 64 * i + j, target, 64 * j + i, 64)
    pairs, distance = SIDE // 2, 1
    for stage in range(6, 12):
        full = stage < keep or stage >= keep + skip
        _column_stage(target, pairs, distance, width, full, value, quotient, prime)
        distance *= 2 if full else 1
        pairs >>= 1
    if keep + skip < 12:
        # The last stage was full: its sums have yet to be divided by N; its differences are.
        for n in range(64 * (distance // 2)):
            target[n] = multiply_shoup(target[n], value[0], quotient[0], prime)


@kernel
def inverse_pruned(source, target, keep, skip, factors, prime):
    """Only the coefficients k of the inverse transform whose bits keep .. keep + skip - 1 are all ones.

    Of the ``skip`` inverse stages after the first ``keep`` <= 6 only the differences are needed, and what is
    left closes up; keep + skip <= 12, so the stage that joins two halves is never skipped. Coefficient k ends,
    below 2p, at ``target[pruned_position(k, keep, skip)]``. Input below 2p; the source is overwritten.
    """
    halves = factors.shape[0]
    for half in range(halves):
        start, end = half * HALF, (half + 1) * HALF
        _inverse_pruned_half(source[start:end], target[start:end], keep, skip, factors[half], prime)
    if halves == 2:
        _join(target, HALF >> max(keep + skip - 6, 0), factors, prime)


@inlined
def pruned_position(coefficient, keep, skip):
    """Where `inverse_pruned` leaves this coefficient: in its half, the upper and the lower six bits of its index with
    the skipped ones closed up.
    """
    half, coefficient = coefficient & HALF, coefficient & (HALF - 1)
    column = coefficient & 63
    line = (column & ((1 << keep) - 1)) | ((column >> min(keep + skip, 6)) << keep)
    return half + 64 * (coefficient >> (6 + max(keep + skip - 6, 0))) + line


@kernel
def forward_all(polynomials, target, factors, primes):
    """Transform uint32 [n, primes, N] below 4p (overwritten) into ``target``, fully reduced."""
    for index in range(polynomials.shape[0]):
        for i in range(primes.shape[0]):
            prime = primes[i]
            output = target[index, i]
            forward(polynomials[index, i], output, factors[i], prime)
            for n in range(output.shape[0]):
                output[n] = reduce_once(reduce_once(output[n], np.uint32(2 * prime)), prime)


@kernel
def inverse_all(polynomials, target, factors, primes):
    """Inverse of `forward_all`: uint32 [n, primes, N] below 2p (overwritten) into ``target``, fully
    reduced.
    """
    for index in range(polynomials.shape[0]):
        for i in range(primes.shape[0]):
            output = target[index, i]
            inverse(polynomials[index, i], output, factors[i], primes[i])
            for n in range(output.shape[0]):
                output[n] = reduce_once(output[n], primes[i])
