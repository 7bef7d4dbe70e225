"""Random orthogonal matrices from a cryptographic generator.

They hide which basis of an adapter's column space training found, so they must not come from numpy's
generators.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

RandomBytes = Callable[[int], bytes]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]


def standard_normal(rows: int, columns: int, random_bytes: RandomBytes = os.urandom) -> Float64Array:
    """Independent standard normal numbers, float64 [rows, columns], by the Box-Muller transform."""
    count = rows * columns
    pairs = (count + 1) // 2
    words = np.frombuffer(random_bytes(16 * pairs), dtype="<u8")
    # 53 bits each; the first lot in (0, 1], where the logarithm is finite.
    radius = ((words[:pairs] >> 11) + 1) * 2.0**-53
    angle = (words[pairs:] >> 11) * 2.0**-53
    length = np.sqrt(-2.0 * np.log(radius))
    normal = np.concatenate([length * np.cos(2.0 * np.pi * angle), length * np.sin(2.0 * np.pi * angle)])
    matrix: Float64Array = normal[:count].reshape(rows, columns)
    return matrix


def haar_orthogonal(size: int, random_bytes: RandomBytes = os.urandom) -> Float64Array:
    """A uniformly (Haar) random orthogonal matrix, float64 [size, size].

    QR of a Gaussian matrix with the columns multiplied by the signs of R's diagonal; without the signs the
    distribution is not uniform (Mezzadri, Notices of the AMS 54, 2007).
    """
    q, r = np.linalg.qr(standard_normal(size, size, random_bytes))
    signs: Float64Array = np.where(np.diag(r) < 0, -1.0, 1.0)
    return q * signs


def random_complement(basis: Float64Array, columns: int, random_bytes: RandomBytes = os.urandom) -> Float64Array:
    """Uniformly random orthonormal columns, orthogonal to the orthonormal `basis` [n, k]; [n, columns]."""
    gaussian = standard_normal(basis.shape[0], columns, random_bytes)
    for _ in range(2):  # twice is enough for orthogonality to working precision (Kahan)
        gaussian -= basis @ (basis.T @ gaussian)
    return np.linalg.qr(gaussian)[0]
