"""`kernels.evaluate` step by step, in Python: the same kernels in the same order, so that a test can look at what is
between two of them or leave one out. `test_evaluator` compares the two bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorguard.ckks import kernels


def evaluate(
    request: Any,
    hiding: Any,
    plan: Any,
    skip: Any,
    first: int,
    c1: Any,
    c0: Any,
    work: Any,
    ring: Any,
    public_key: Any,
) -> None:
    weights, b, a, keys = request
    trits, error_words, made_ahead, flood = hiding
    inputs, expansion, sums, transforms, errors, all_c1, all_c0 = work
    constants, factors, primes, drops = ring
    count, made = len(c1), len(trits)
    errors.fill(0)
    for response in range(made):
        kernels.centred_binomial(error_words[response], errors[response])
    for i, prime in enumerate(primes):
        if len(keys):
            whole = np.empty_like(b)
            kernels.expand(keys, primes, expansion, whole)
            a[:, 0] = whole[:, i]
        kernels.multiply(weights, b, a, i, sums, inputs, constants, first, first + count)
        for response in range(count):
            if response < made:
                kernels.add_encryption_of_zero(
                    sums[response], trits[response], public_key, i, transforms, factors[i], prime
                )
            else:
                kernels.add_made_ahead(sums[response], made_ahead[response - made], i, prime)
            kernels.recover(
                sums[response],
                errors[response],
                flood,
                first + response,
                i,
                plan,
                skip,
                all_c1[response, i],
                all_c0[response, i],
                factors[i],
                prime,
            )
    groups = -(-c0.shape[1] // plan[2])
    for response in range(count):
        kernels.switch_modulus(all_c1[response], c1.shape[1], primes, drops)
        kernels.switch_modulus(all_c0[response], all_c0.shape[2], primes, drops)
        c1[response] = all_c1[response, 0]
        chunk, group = divmod(first + response, groups)
        part = c0[chunk * plan[0] : (chunk + 1) * plan[0], group * plan[2] : (group + 1) * plan[2]]
        part[...] = all_c0[response, 0, : part.size].reshape(part.shape)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the evaluator goes step by step, through whatever stands in `kernels` then."""
    monkeypatch.setattr(kernels, "evaluate", evaluate)


def without_encryption_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is added to the products, neither made in line nor taken from a pool."""
    install(monkeypatch)
    monkeypatch.setattr(kernels, "add_encryption_of_zero", lambda *_: None)
    monkeypatch.setattr(kernels, "add_made_ahead", lambda *_: None)
