"""Compiled encryption and decryption."""

# numba compiles these from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np

from tensorguard.ckks.compiled import inlined, kernel
from tensorguard.ckks.kernels.places import place_message, wanted_position
from tensorguard.ckks.kernels.sampling import centred_binomial
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.ntt import forward, inverse_pruned, reduce_once
from tensorguard.ckks.pointwise import add_reduced, plaintext, product, reduced_sum


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
        place_message(mantissas, plan, first + index, message, degree)
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
        place_message(mantissas, plan, first + index, message, degree)
        for i in range(primes.shape[0]):
            prime = primes[i]
            factor, factor_shoup = scale[i, 0], scale[i, 1]
            for n in range(0, degree, LANES):
                plaintext(coefficients, (message, nothing), n, (factor, factor_shoup, prime))
            forward(coefficients, transformed, factors[i], prime)
            output = b[index, i]
            for n in range(0, degree, LANES):
                add_reduced(output, (transformed,), n, (prime,))


@inlined
def _centred(residue, prime):
    """The representative of a reduced residue in (-p/2, p/2), as int32."""
    half = np.uint32(prime >> np.uint32(1))
    return np.int32(residue) - np.int32(prime) * np.int32(residue > half)


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
