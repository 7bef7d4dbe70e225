"""Checked mode: one more row per request, a secret random combination of the others, that must fit the response.

The evaluator is linear over tokens, so the row Σ α_t·x̂_t must come back as Σ α_t·z_t up to noise. Whoever changes one
token's result without knowing α breaks that. What is linear over tokens as well (other weights, a constant factor)
passes: this finds targeted changes, it does not verify the product (docs/protocol.md, "Checked mode").
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.parameters import MANTISSA_BITS, ParameterSet
from tensorguard.ckks.randomness import SecretStream

TOLERANCE = 8.0
"""Standard deviations. An honest value lies outside with probability about 2^-49."""


def add_check_row(mantissas: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """int32 [T + 1, d_in], the last row Σ α_t·mantissas_t rounded, and the secret α float64 [T].

    ``mantissas`` int32 [T, d_in] are normalised rows in units of 2^-30, and so is the new one: its norm is at most 1.
    α_t has a random sign and a magnitude uniform in [1/2, 1), never near 0, where a change would go unseen; all are
    divided by the norm of the combination where that is over 1.
    """
    words = SecretStream("check weights").words(len(mantissas))
    alpha = (0.5 + (words >> np.uint64(12)).astype(np.float64) * 2.0**-53) * (
        1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
    )
    combination = alpha @ mantissas.astype(np.float64)
    shrink = max(1.0, float(np.linalg.norm(combination)) * 2.0**-MANTISSA_BITS)
    alpha /= shrink
    check = np.rint(combination / shrink).astype(np.int32)
    return np.concatenate([mantissas, check[None]]), alpha


def fits(values: npt.NDArray[np.int32], alpha: npt.NDArray[np.float64], parameters: ParameterSet) -> bool:
    """Whether the last row of decrypted residues [T + 1, rows] is Σ α_t of the others, within `TOLERANCE`."""
    difference = values[-1] - alpha @ values[:-1].astype(np.float64)
    limit = TOLERANCE * response_noise(parameters) * math.sqrt(1.0 + float(alpha @ alpha))
    return bool(np.abs(difference).max() <= limit)


def response_noise(parameters: ParameterSet) -> float:
    """Standard deviation of one decrypted value, in residues modulo p0: what `ParameterSet.noise` is made of."""
    return parameters.noise(1.0) * 0.45 * parameters.primes[0]
