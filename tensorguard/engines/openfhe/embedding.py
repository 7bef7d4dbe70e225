"""Coefficients as the complex slots that OpenFHE's packed plaintexts are made from.

OpenFHE encodes N/2 complex slots v as the real polynomial m with m(ζ^(5^j)) = v_j, ζ = exp(iπ/N). Given the values
of an integer polynomial there, it finds the integers again, up to rounding errors far below one half.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

LIMB_BITS = 30
"""OpenFHE's scale is 2**30 and each further degree of a plaintext multiplies it, exactly, by as much again."""
LARGEST_COEFFICIENT_BITS = 44
"""Coefficients up to here come back exactly: doubles have 53 bits, and the transforms lose about 3."""


def slots(coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.complex128]:
    """complex128 [..., N / 2] for integer-valued float64 [..., N], divided by OpenFHE's scale of 2**30."""
    twist, order = _constants(coefficients.shape[-1])
    values: npt.NDArray[np.complex128] = np.fft.ifft(coefficients * twist, norm="forward")
    return values[..., order]


@lru_cache(maxsize=4)
def _constants(degree: int) -> tuple[npt.NDArray[np.complex128], npt.NDArray[np.int64]]:
    """ζ^k / 2**30 for the coefficients k, and where a transform of twisted coefficients has the value at ζ^(5^j)."""
    twist = np.exp(1j * np.pi * np.arange(degree) / degree) * 2.0**-LIMB_BITS
    exponents = [pow(5, j, 2 * degree) for j in range(degree // 2)]
    return twist, (np.array(exponents) - 1) // 2
