"""Compiled inner loops of sampling, encryption, evaluation and decryption.

All residues are uint32 modulo primes below 2**30; "lazy" values may exceed the prime as each docstring says.
Nothing branches on, indexes by or divides by a secret. One call handles a whole request, so call overhead is
paid once.
"""

# numba compiles these from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np

from tensorguard.ckks.chacha20 import chacha20_words
from tensorguard.ckks.compiled import inlined, kernel
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.ntt import (
    forward,
    inverse,
    inverse_pruned,
    multiply_shoup,
    pruned_position,
    reduce_once,
)
from tensorguard.ckks.pointwise import (
    add_product,
    add_reduced,
    count_ones,
    drop,
    plaintext,
    product,
    reduced_sum,
    with_error,
)
from tensorguard.ckks.simd import SEGMENT, copy_segment, multiply_accumulate

ERROR_HALF_WIDTH = 21
"""Centred binomial: the sum of 42 fair bits minus 21, variance 10.5."""
TERNARY_VALUES_PER_BYTE = 5
FLOOD_TERMS = 4
MAX_PRODUCTS = 16
"""Products of two 30-bit residues that fit an unsigned 64-bit sum."""


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
def expand(keys, primes, words, residues):
    """Residues uint32 [n, primes, N] from ChaCha20 keys uint32 [n, 8]: in order, the low 30 bits of the words of
    the stream with nonce i that are below prime i. Public values only. ``words`` is scratch [256].
    """
    mask = np.uint32(0x3FFFFFFF)
    wanted = residues.shape[2]
    for index in range(keys.shape[0]):
        for i in range(primes.shape[0]):
            output, prime = residues[index, i], primes[i]
            for n in range(0, wanted, 256):
                chacha20_words(keys[index], np.uint32(i), np.uint32(n // 16), output, n)
            largest = np.uint32(0)
            for n in range(wanted):
                value = output[n] & mask
                output[n] = value
                largest = max(largest, value)
            if largest < prime:
                continue
            accepted = 0
            for n in range(wanted):
                value = output[n]
                if value < prime:
                    output[accepted] = value
                    accepted += 1
            block = wanted // 16
            while accepted < wanted:
                chacha20_words(keys[index], np.uint32(i), np.uint32(block), words, 0)
                block += 16
                for n in range(256):
                    value = words[n] & mask
                    if value < prime and accepted < wanted:
                        output[accepted] = value
                        accepted += 1


@kernel
def accept_ternary(random_bytes, accepted, trits):
    """Fill uint8 [N] ``trits`` with uniform 0, 1, 2: bytes below 243 hold five base-3 digits each.

    Rejected bytes are independent of the accepted ones, and both take the same time. Returns False if there
    were too few bytes. ``accepted`` is scratch of at least as many bytes.
    """
    degree = trits.shape[0]
    groups = (degree + TERNARY_VALUES_PER_BYTE - 1) // TERNARY_VALUES_PER_BYTE
    count = 0
    for n in range(random_bytes.shape[0]):
        value = random_bytes[n]
        accepted[count] = value
        count += np.int64(value < 243)
    if count < groups:
        return False
    for digit in range(TERNARY_VALUES_PER_BYTE):
        start = digit * groups
        for n in range(min(groups, degree - start)):
            quotient = np.uint8((np.uint32(accepted[n]) * np.uint32(171)) >> np.uint32(9))  # floor(value / 3)
            trits[start + n] = np.uint8(accepted[n] - np.uint8(3) * quotient)
            accepted[n] = quotient
        # The last digit needs no further quotient.
    return True


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
def normalise(x, mantissas, norms):
    """Divide each row of float64 ``x`` by its L2 norm (of a zero row: by 1) into int32 units of 2**-30.

    Returns False, with unspecified outputs, if a value or a norm is not finite.
    """
    for token in range(x.shape[0]):
        row = x[token]
        peak = 0.0
        finite = True
        for i in range(row.shape[0]):
            magnitude = abs(row[i])
            finite &= magnitude < np.inf
            peak = max(peak, magnitude)
        if not finite:
            return False
        divisor = peak if peak > 0.0 else 1.0
        squares = 0.0
        for i in range(row.shape[0]):
            value = row[i] / divisor
            squares += value * value
        norm = np.sqrt(squares) if peak > 0.0 else 1.0
        norms[token] = norm * divisor
        if not norms[token] < np.inf:
            return False
        for i in range(row.shape[0]):
            mantissas[token, i] = np.int32(np.rint(row[i] / divisor / norm * 1073741824.0))
    return True


@inlined
def _place_message(mantissas, plan, index, message, degree):
    """Write a ciphertext's mantissas to the coefficients of the plan, and zeros to the others."""
    tokens, channels = mantissas.shape
    plan_tokens, plan_channels, _ = plan
    blocks = (channels + plan_channels - 1) // plan_channels
    chunk, block = index // blocks, index % blocks
    first_token, first_channel = chunk * plan_tokens, block * plan_channels
    width = min(plan_channels, channels - first_channel)
    for n in range(degree):
        message[n] = 0
    for token in range(min(plan_tokens, tokens - first_token)):
        row = mantissas[first_token + token, first_channel : first_channel + width]
        for n in range(width):
            message[n * plan_tokens + token] = row[n]


@kernel
def encrypt(mantissas, plan, scale, words, uniform, negated_key, b, first, work, signed, factors, primes):
    """b = -a s + NTT(e + Δ m), fully reduced, for the ciphertexts ``first`` onwards of a request.

    mantissas int32 [T, d]; plan (T', d', r'); scale uint32 [primes, 2] (Δ and its Shoup quotient); words
    uint64 [C, error_words]; uniform a, b uint32 [C, primes, N]; negated_key uint32 [primes, 2, N]; scratch: work
    uint32 [N], signed int32 [2, error_values].
    """
    degree = work.shape[0]
    errors, message = signed[0], signed[1]
    for index in range(b.shape[0]):
        centred_binomial(words[index], errors)
        _place_message(mantissas, plan, first + index, message, degree)
        for i in range(primes.shape[0]):
            prime = primes[i]
            factor, factor_shoup = scale[i, 0], scale[i, 1]
            for n in range(0, degree, LANES):
                plaintext(work, (message, errors), n, (factor, factor_shoup, prime))
            output = b[index, i]
            forward(work, output, factors[i], prime)
            mask, key, key_shoup = uniform[index, i], negated_key[i, 0], negated_key[i, 1]
            for n in range(0, degree, LANES):
                reduced_sum(output, (mask, key, key_shoup), n, (prime,))


@kernel
def add_messages(mantissas, plan, scale, first, b, work, signed, factors, primes):
    """b += NTT(Δ m), fully reduced: turns encryptions of zero into those of a request's ciphertexts from ``first`` on.

    b uint32 [C - first, primes, N]; scratch: work uint32 [2, N]; the rest as in `encrypt`.
    """
    coefficients, transformed = work[0], work[1]
    nothing, message = signed[0], signed[1]
    degree = work.shape[1]
    for n in range(degree):
        nothing[n] = 0
    for index in range(b.shape[0]):
        _place_message(mantissas, plan, first + index, message, degree)
        for i in range(primes.shape[0]):
            prime = primes[i]
            factor, factor_shoup = scale[i, 0], scale[i, 1]
            for n in range(0, degree, LANES):
                plaintext(coefficients, (message, nothing), n, (factor, factor_shoup, prime))
            forward(coefficients, transformed, factors[i], prime)
            output = b[index, i]
            for n in range(0, degree, LANES):
                add_reduced(output, (transformed,), n, (prime,))


@kernel
def all_reduced(residues, primes):
    """Whether every residue of uint32 [n, primes, N] is below its prime."""
    reduced = True
    for index in range(residues.shape[0]):
        for i in range(primes.shape[0]):
            row = residues[index, i]
            largest = np.uint32(0)
            for n in range(row.shape[0]):
                largest = max(largest, row[n])
            reduced &= largest < primes[i]
    return reduced


@kernel
def encode_weights(integers, plan, encoded, scratch, transformed, factors, primes):
    """Transform int32 [rows, d] weights into uint32 [primes, N / (64 T'), row groups, blocks, 64].

    A weight polynomial has only powers of X^T', so T' neighbouring rows of 64 transform values are equal: one
    is kept.
    """
    total_rows, total_channels = integers.shape
    tokens, channels, rows = plan
    _, segments, groups, blocks, _ = encoded.shape
    for group in range(groups):
        for block in range(blocks):
            for i in range(primes.shape[0]):
                prime = primes[i]
                for n in range(scratch.shape[0]):
                    scratch[n] = np.uint32(0)
                for j in range(min(rows, total_rows - group * rows)):
                    for c in range(min(channels, total_channels - block * channels)):
                        value = np.int64(integers[group * rows + j, block * channels + c]) % np.int64(prime)
                        scratch[tokens * (j * channels + channels - 1 - c)] = np.uint32(value)
                forward(scratch, transformed, factors[i], prime)
                for segment in range(segments):
                    for lane in range(SEGMENT):
                        value = reduce_once(transformed[segment * tokens * SEGMENT + lane], np.uint32(2 * prime))
                        encoded[i, segment, group, block, lane] = reduce_once(value, prime)


@kernel
def accumulate(weights, b, a, chunks, sums, constants, inputs, first, end):
    """Σ_blocks (b, a)·Ŵ for every response: uint32 [responses, primes, 2, N], below 2p; only rows of 64 places
    ``first`` to ``end`` - 1 of each polynomial.

    weights as `encode_weights` makes them; b, a uint32 [chunks * blocks, primes, N]; scratch: inputs uint32 [blocks, 2,
    64]. One row of all blocks is gathered there, since where it lies its lines share a few sets of the first-level
    cache, and meets the weights of one segment, which are read in order.
    """
    prime_count, segments, groups, blocks, _ = weights.shape
    degree = b.shape[2]
    rows = degree // SEGMENT
    flat_b, flat_a, flat_inputs, flat_weights = b.reshape(-1), a.reshape(-1), inputs.reshape(-1), weights.reshape(-1)
    flat_sums, flat_constants = sums.reshape(-1), constants.reshape(-1)
    for i in range(prime_count):
        for row in range(first, end):
            segment, start = row * segments // rows, row * SEGMENT
            for chunk in range(chunks):
                for block in range(blocks):
                    source = ((chunk * blocks + block) * prime_count + i) * degree + start
                    copy_segment(flat_b, source, flat_inputs, 2 * SEGMENT * block)
                    copy_segment(flat_a, source, flat_inputs, 2 * SEGMENT * block + SEGMENT)
                for group in range(groups):
                    weight_at = ((i * segments + segment) * groups + group) * blocks * SEGMENT
                    sum_at = ((chunk * groups + group) * prime_count + i) * 2 * degree + start
                    for n in range(sum_at, sum_at + SEGMENT):
                        flat_sums[n] = np.uint32(0)
                        flat_sums[n + degree] = np.uint32(0)
                    for block in range(0, blocks, MAX_PRODUCTS):
                        multiply_accumulate(
                            flat_sums,
                            sum_at,
                            degree,
                            flat_weights,
                            weight_at + block * SEGMENT,
                            flat_inputs,
                            block * 2 * SEGMENT,
                            min(MAX_PRODUCTS, blocks - block),
                            flat_constants,
                            i * constants.shape[1],
                        )


@inlined
def _centred(residue, prime):
    """The representative of a reduced residue in (-p/2, p/2), as int32."""
    half = np.uint32(prime >> np.uint32(1))
    return np.int32(residue) - np.int32(prime) * np.int32(residue > half)


@inlined
def _switch(residues, count, primes, drops):
    """Exact centred modulus switch of ``residues[:, :count]``, uint32 [primes, ...] and fully reduced, to the first
    prime: the others are dropped from the last to the second. In place; the result is in ``residues[0]``.

    drops uint32 [primes, primes, 2]: 1/p_k mod p_i at [k, i], and its Shoup quotient. ``count`` is rounded up to 16.
    """
    for last in range(primes.shape[0] - 1, 0, -1):
        dropped, other = residues[last], primes[last]
        for i in range(last):
            row, prime, factor, factor_shoup = residues[i], primes[i], drops[last, i, 0], drops[last, i, 1]
            for n in range(0, count, LANES):
                drop(row, (dropped,), n, (prime, other, factor, factor_shoup))


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


@kernel
def add_encryption_of_zero(sums, trits, public_key, scratch, transformed, factors, primes):
    """Add (pk0·u, pk1·u) to each response's (c0, c1) in the transform domain.

    sums uint32 [responses, primes, 2, N], below 2p before and after; trits uint8 [responses, N], u + 1;
    public_key uint32 [2, primes, 2, N].
    """
    for response in range(sums.shape[0]):
        for i in range(primes.shape[0]):
            prime = primes[i]
            offset = np.uint32(prime - np.uint32(1))
            row = trits[response]
            for n in range(row.shape[0]):
                scratch[n] = np.uint32(np.uint32(row[n]) + offset)
            forward(scratch, transformed, factors[i], prime)
            for half in range(2):
                total, key, key_shoup = (
                    sums[response, i, half],
                    public_key[half, i, 0],
                    public_key[half, i, 1],
                )
                for n in range(0, row.shape[0], LANES):
                    add_product(total, (transformed, key, key_shoup), n, (prime,))


@kernel
def add_error(sums, error_words, scratch, transformed, errors, factors, primes):
    """Add NTT(e1) to each c1 in the transform domain.

    sums as above; error_words uint64 [responses, error_words]; scratch and transformed uint32 [N], errors int32
    [error_values].
    """
    for response in range(sums.shape[0]):
        centred_binomial(error_words[response], errors)
        for i in range(primes.shape[0]):
            prime = primes[i]
            double = np.uint32(2 * prime)
            for n in range(scratch.shape[0]):
                scratch[n] = np.uint32(np.uint32(errors[n]) + prime)
            forward(scratch, transformed, factors[i], prime)
            total = sums[response, i, 1]
            for n in range(scratch.shape[0]):
                total[n] = reduce_once(np.uint32(total[n] + reduce_once(transformed[n], double)), double)


@kernel
def add_lazily(total, addend, primes):
    """total += addend, both uint32 [primes, 2, N] below 2p."""
    for i in range(primes.shape[0]):
        double = np.uint32(2 * primes[i])
        for half in range(2):
            row, other = total[i, half], addend[i, half]
            for n in range(row.shape[0]):
                row[n] = reduce_once(np.uint32(row[n] + other[n]), double)


@kernel
def finish(sums, error_words, flood_residues, plan, skip, first, c1, c0, work, wanted, errors, factors, primes, drops):
    """Back to coefficients, add e1 and f, switch the modulus, keep only the wanted coefficients of c0: responses
    ``first`` onwards.

    sums as above, overwritten; error_words uint64 [n, error_words] for the first n responses (the others have their
    e1); flood_residues uint32 [tokens, rows, primes]; plan (T', d', r'); skip (see `Plan.skip`); c1 uint32
    [responses, N]; c0 uint32 [tokens, rows]; scratch: work uint32 [primes, N], wanted uint32 [primes, T' r' rounded
    up to 16], errors int32 [error_values].
    """
    tokens, rows = c0.shape
    plan_tokens, _, plan_rows = plan
    groups = (rows + plan_rows - 1) // plan_rows
    degree = c1.shape[1]
    for response in range(sums.shape[0]):
        chunk, group = (first + response) // groups, (first + response) % groups
        first_token, first_row = chunk * plan_tokens, group * plan_rows
        some_tokens, some_rows = min(plan_tokens, tokens - first_token), min(plan_rows, rows - first_row)
        if response < error_words.shape[0]:
            centred_binomial(error_words[response], errors)
        else:
            for n in range(degree):
                errors[n] = 0
        for i in range(primes.shape[0]):
            prime = primes[i]
            c0_values, c1_values, row, chosen = sums[response, i, 0], sums[response, i, 1], work[i], wanted[i]
            inverse(c1_values, row, factors[i], prime)
            for n in range(0, degree, LANES):
                with_error(row, (errors,), n, (prime,))
            inverse_pruned(c0_values, c1_values, skip[0], skip[1], factors[i], prime)
            for token in range(some_tokens):
                for j in range(some_rows):
                    value = c1_values[wanted_position(token, j, plan, skip)]
                    mask = flood_residues[first_token + token, first_row + j, i]
                    total = reduce_once(np.uint32(value + mask), np.uint32(2 * prime))
                    chosen[token * some_rows + j] = reduce_once(total, prime)
        _switch(work, degree, primes, drops)
        _switch(wanted, some_tokens * some_rows, primes, drops)
        output = c1[response]
        for n in range(degree):
            output[n] = work[0, n]
        for token in range(some_tokens):
            for j in range(some_rows):
                c0[first_token + token, first_row + j] = wanted[0, token * some_rows + j]


@inlined
def wanted_position(token, row, plan, skip):
    """Where the pruned inverse leaves the product of this token and row: coefficient T'(j d' + d' - 1) + t."""
    tokens, channels, _ = plan
    return pruned_position(tokens * (row * channels + channels - 1) + token, skip[0], skip[1])


@kernel
def decrypt(c1, c0, plan, skip, key, values, scratch, transformed, factors, prime):
    """int32 [tokens, rows] ``values``: centred (c0 + c1·s) mod p0 at the wanted coefficients.

    c1 uint32 [responses, N]; c0 uint32 [tokens, rows]; key uint32 [2, N]; plan and skip as in `finish`.
    """
    tokens, rows = c0.shape
    plan_tokens, _, plan_rows = plan
    groups = (rows + plan_rows - 1) // plan_rows
    double = np.uint32(2 * prime)
    for response in range(c1.shape[0]):
        chunk, group = response // groups, response % groups
        for n in range(c1.shape[1]):
            scratch[n] = c1[response, n]
        forward(scratch, transformed, factors, prime)
        for n in range(0, c1.shape[1], LANES):
            product(transformed, (key[0], key[1]), n, (prime,))
        inverse_pruned(transformed, scratch, skip[0], skip[1], factors, prime)
        for token in range(chunk * plan_tokens, min((chunk + 1) * plan_tokens, tokens)):
            for row in range(group * plan_rows, min((group + 1) * plan_rows, rows)):
                at = wanted_position(token - chunk * plan_tokens, row - group * plan_rows, plan, skip)
                total = reduce_once(np.uint32(scratch[at] + c0[token, row]), double)
                values[token, row] = _centred(reduce_once(total, prime), prime)
