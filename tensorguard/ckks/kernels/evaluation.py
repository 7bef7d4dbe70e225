"""The compiled evaluation: products with the weights, encryptions of zero, floods, the modulus switch.

`evaluate` is the whole of it and goes prime by prime, so that what one prime needs stays in the processor's cache. Its
steps are kernels of their own, so that they can be looked at one by one.
"""

# numba compiles these from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np

from tensorguard.ckks.compiled import inlined, kernel
from tensorguard.ckks.kernels.places import wanted_position
from tensorguard.ckks.kernels.sampling import centred_binomial, expand_polynomial
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.ntt import forward, inverse, inverse_pruned, multiply_shoup, reduce_once
from tensorguard.ckks.pointwise import add_product, drop, take_from, with_error
from tensorguard.ckks.products import GATHERED, SEGMENT, gather_segment, multiply_accumulate


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
def encode_weights(integers, plan, encoded, scratch, transformed, constants, factors, primes):
    """Transform int32 [rows, d] weights, times 2**32, into uint32 [primes, N / (64 T'), row groups, blocks, 64].

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
                        value = transformed[segment * tokens * SEGMENT + lane]
                        value = multiply_shoup(value, constants[i, 1], constants[i, 2], prime)
                        encoded[i, segment, group, block, lane] = reduce_once(value, prime)


@kernel
def multiply(weights, b, a, i, sums, inputs, constants, first, end):
    """Σ_blocks (b, a)·Ŵ modulo prime ``i`` for the responses ``first`` to ``end`` - 1: uint32 [end - first, 2, N],
    below 2p.

    weights as `encode_weights` makes them; b uint32 [chunks * blocks, primes, N]; a likewise, or [chunks * blocks, 1,
    N] modulo this prime only; constants uint32 [primes, 5] (see `Ring`); scratch: inputs uint32 [blocks, 4, 64]. One
    row of 64 places of all blocks is gathered there, since where it lies its lines share a few sets of the first-level
    cache, and meets the weights of one segment, which are read in order.
    """
    _, segments, groups, blocks, _ = weights.shape
    primes, degree = b.shape[1], b.shape[2]
    primes_of_a = a.shape[1]
    rows = degree // SEGMENT
    flat_b, flat_a, flat_inputs, flat_weights = b.reshape(-1), a.reshape(-1), inputs.reshape(-1), weights.reshape(-1)
    flat_sums = sums.reshape(-1)
    if first == end:
        return
    for row in range(rows):
        segment, start = row * segments // rows, row * SEGMENT
        for chunk in range(first // groups, (end - 1) // groups + 1):
            for block in range(blocks):
                index, to = chunk * blocks + block, GATHERED * block
                gather_segment(flat_b, (index * primes + i) * degree + start, flat_inputs, to)
                gather_segment(
                    flat_a,
                    (index * primes_of_a + min(i, primes_of_a - 1)) * degree + start,
                    flat_inputs,
                    to + 2 * SEGMENT,
                )
            for group in range(max(first - chunk * groups, 0), min(end - chunk * groups, groups)):
                multiply_accumulate(
                    flat_sums,
                    (chunk * groups + group - first) * 2 * degree + start,
                    degree,
                    flat_weights,
                    ((i * segments + segment) * groups + group) * blocks * SEGMENT,
                    flat_inputs,
                    blocks,
                    constants[i, 0],
                    constants[i, 4],
                )


@kernel
def add_encryption_of_zero(sums, trits, public_key, i, work, factors, prime):
    """Add (pk0·u, pk1·u) to one response's (c0, c1) modulo prime ``i``, in the transform domain.

    sums uint32 [2, N], below 2p before and after; trits uint8 [N], u + 1; public_key uint32 [2, primes, 2, N]; factors
    of this prime; scratch: work uint32 [2, N].
    """
    scratch, transformed = work[0], work[1]
    offset = np.uint32(prime - np.uint32(1))
    for n in range(trits.shape[0]):
        scratch[n] = np.uint32(np.uint32(trits[n]) + offset)
    forward(scratch, transformed, factors, prime)
    for half in range(2):
        total, key, key_shoup = sums[half], public_key[half, i, 0], public_key[half, i, 1]
        for n in range(0, trits.shape[0], LANES):
            add_product(total, (transformed, key, key_shoup), n, (prime,))


@kernel
def add_error(c1, errors, work, factors, prime):
    """Add NTT(e1) to one response's c1, uint32 [N] below 2p, in the transform domain.

    errors int32 [error_values]; scratch: work uint32 [2, N].
    """
    scratch, transformed = work[0], work[1]
    double = np.uint32(2 * prime)
    for n in range(scratch.shape[0]):
        scratch[n] = np.uint32(np.uint32(errors[n]) + prime)
    forward(scratch, transformed, factors, prime)
    for n in range(scratch.shape[0]):
        c1[n] = reduce_once(np.uint32(c1[n] + reduce_once(transformed[n], double)), double)


@kernel
def encrypt_zero(values, trits, error_words, public_key, errors, work, factors, primes):
    """(pk0·u, pk1·u + e1) to uint32 [primes, 2, N] ``values``, transform domain, below 2p.

    trits and public_key as above; error_words uint64 [error_words]; scratch: errors int32 [error_values], work uint32
    [2, N].
    """
    centred_binomial(error_words, errors)
    for i in range(primes.shape[0]):
        for half in range(2):
            row = values[i, half]
            for n in range(row.shape[0]):
                row[n] = np.uint32(0)
        add_encryption_of_zero(values[i], trits, public_key, i, work, factors[i], primes[i])
        add_error(values[i, 1], errors, work, factors[i], primes[i])


@kernel
def add_made_ahead(sums, address, i, prime):
    """Add the encryption of zero at ``address``, uint32 [primes, 2, N] below 2p, to one response's (c0, c1) modulo
    prime ``i``: uint32 [2, N], below 2p before and after. It is overwritten with zeros, so it cannot be added again.
    """
    degree = sums.shape[1]
    for half in range(2):
        for n in range(0, degree, LANES):
            take_from(sums[half], n, address, (2 * i + half) * degree + n, prime)


@inlined
def _part(response, plan, residues):
    """(first token, first row, tokens, rows) of a response to a request of residues.shape[:2] tokens and rows."""
    plan_tokens, _, plan_rows = plan
    tokens, rows = residues.shape[0], residues.shape[1]
    groups = (rows + plan_rows - 1) // plan_rows
    first_token, first_row = response // groups * plan_tokens, response % groups * plan_rows
    return first_token, first_row, min(plan_tokens, tokens - first_token), min(plan_rows, rows - first_row)


@kernel
def recover(sums, errors, flood_residues, response, i, plan, skip, c1, c0, factors, prime):
    """Modulo prime ``i``: back to coefficients, add e1 to c1, f to the wanted coefficients of c0, keep only those.

    sums uint32 [2, N] below 2p, overwritten, of this response; errors int32 [error_values]; flood_residues uint32
    [tokens, rows, primes]; plan (T', d', r'); skip (see `Plan.skip`); c1 uint32 [N], c0 uint32 [at least T' r'] at
    [token, row] of this response: both fully reduced.
    """
    first_token, first_row, some_tokens, some_rows = _part(response, plan, flood_residues)
    c0_values, c1_values = sums[0], sums[1]
    inverse(c1_values, c1, factors, prime)
    for n in range(0, c1.shape[0], LANES):
        with_error(c1, (errors,), n, (prime,))
    inverse_pruned(c0_values, c1_values, skip[0], skip[1], factors, prime)
    for token in range(some_tokens):
        for j in range(some_rows):
            value = c1_values[wanted_position(token, j, plan, skip)]
            mask = flood_residues[first_token + token, first_row + j, i]
            total = reduce_once(np.uint32(value + mask), np.uint32(2 * prime))
            c0[token * some_rows + j] = reduce_once(total, prime)


@kernel
def switch_modulus(residues, count, primes, drops):
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
def evaluate(request, hiding, plan, skip, first, c1, c0, work, ring, public_key):
    """W·x, re-randomised, flooded and modulo p0: the responses ``first`` onwards, as many as c1 has.

    request: (weights, b, a, keys) with weights, b and a as in `multiply`; if there are keys, uint32 [C, 8], a is
    scratch [C, 1, N] and they are expanded into it. hiding: (trits uint8 [n, N], error_words uint64 [n, error_words],
    made_ahead uint64 [m], flood_residues uint32 [tokens, rows, primes]): n encryptions of zero are made, for the first
    of these responses, and m are at these addresses. plan (T', d', r'); skip (see `Plan.skip`); c1 uint32
    [responses, N]; c0 uint32 [tokens, rows]; ring: (constants, factors, primes, drops) of `Ring`; public_key uint32
    [2, primes, 2, N].
    Scratch, work: inputs [blocks, 4, 64], expansion [256], sums [responses, 2, N], transforms [2, N], errors int32
    [responses, error_values], all c1 [responses, primes, N] and all c0 [responses, primes, T' r' rounded up to 16].
    """
    weights, b, a, keys = request
    trits, error_words, made_ahead, flood_residues = hiding
    inputs, expansion, sums, transforms, errors, all_c1, all_c0 = work
    constants, factors, primes, drops = ring
    count, made = c1.shape[0], trits.shape[0]
    for response in range(count):
        if response < made:
            centred_binomial(error_words[response], errors[response])
        else:
            row = errors[response]
            for n in range(row.shape[0]):
                row[n] = 0
    for i in range(primes.shape[0]):
        prime = primes[i]
        for index in range(keys.shape[0]):
            expand_polynomial(keys[index], i, prime, expansion, a[index, 0])
        multiply(weights, b, a, i, sums, inputs, constants, first, first + count)
        for response in range(count):
            pair = sums[response]
            if response < made:
                add_encryption_of_zero(pair, trits[response], public_key, i, transforms, factors[i], prime)
            else:
                add_made_ahead(pair, made_ahead[response - made], i, prime)
            recover(
                pair,
                errors[response],
                flood_residues,
                first + response,
                i,
                plan,
                skip,
                all_c1[response, i],
                all_c0[response, i],
                factors[i],
                prime,
            )
    for response in range(count):
        first_token, first_row, tokens, rows = _part(first + response, plan, flood_residues)
        switch_modulus(all_c1[response], c1.shape[1], primes, drops)
        switch_modulus(all_c0[response], tokens * rows, primes, drops)
        source, target = all_c1[response, 0], c1[response]
        for n in range(target.shape[0]):
            target[n] = source[n]
        for token in range(tokens):
            for j in range(rows):
                c0[first_token + token, first_row + j] = all_c0[response, 0, token * rows + j]
