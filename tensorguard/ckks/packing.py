"""Polynomials of 30-bit residues in 15/16 of their memory, for the wire.

Of N residues, the last N/16 are spread over the two unused high bits of the others: with M = N/16,

    word[k·M + j] = v[k·M + j] | ((v[15·M + j] >> 2k) & 3) << 30        k = 0 … 14, j = 0 … M - 1

so that both directions are loops over neighbouring words, which vectorise. Little-endian uint32 in both forms.
"""

# numba compiles the kernels from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.compiled import kernel
from tensorguard.errors import InvalidInputError

RESIDUE_BITS = 30
SHARE = 16
"""One of this many residues travels in the high bits of the others; divides every ring degree."""


@kernel
def _pack(residues, words):
    """uint32 [n, N] into uint32 [n, 15 N / 16]. Returns False if a residue has more than 30 bits."""
    step = residues.shape[1] // SHARE
    everything = np.uint32(0)
    for n in range(residues.shape[0]):
        row, packed = residues[n], words[n]
        for j in range(step):
            everything |= row[(SHARE - 1) * step + j]
        for k in range(SHARE - 1):
            shift = np.uint32(2 * k)
            for j in range(step):
                value = row[k * step + j]
                everything |= value
                high = (row[(SHARE - 1) * step + j] >> shift) & np.uint32(3)
                packed[k * step + j] = value | (high << np.uint32(RESIDUE_BITS))
    return everything >> np.uint32(RESIDUE_BITS) == 0


@kernel
def _unpack(words, residues):
    """The inverse of `_pack`: every residue has 30 bits, whatever the words are."""
    step = residues.shape[1] // SHARE
    low = np.uint32((1 << RESIDUE_BITS) - 1)
    for n in range(residues.shape[0]):
        packed, row = words[n], residues[n]
        for j in range((SHARE - 1) * step):
            row[j] = packed[j] & low
        for j in range(step):
            spread = np.uint32(0)
            for k in range(SHARE - 1):
                spread |= (packed[k * step + j] >> np.uint32(RESIDUE_BITS)) << np.uint32(2 * k)
            row[(SHARE - 1) * step + j] = spread


def packed_bytes(polynomials: int, degree: int) -> int:
    """Bytes of this many packed polynomials of N = `degree` residues."""
    return 4 * polynomials * (degree - degree // SHARE)


def pack(residues: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """uint32 [..., N] of values below 2**30, N a multiple of 16, to words uint32 [n, 15·N/16].

    Raises InvalidInputError for a value of more than 30 bits, which the packed form cannot hold.
    """
    degree = residues.shape[-1]
    # Read-only views, so that each kernel is compiled for one type.
    polynomials = np.ascontiguousarray(residues, np.uint32).reshape(-1, degree)
    polynomials.flags.writeable = False
    words = np.empty((len(polynomials), degree - degree // SHARE), "<u4")
    if not _pack(polynomials, words):
        raise InvalidInputError("a residue has more than 30 bits")
    return words


def unpack(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """uint8 [packed_bytes(n, N)] to a new array uint32 [..., N] of `shape`, n polynomials in all.

    The values are below 2**30, not necessarily below a prime.
    """
    residues = np.empty(shape, np.uint32)
    polynomials = residues.reshape(-1, shape[-1])
    # A peer may have aligned its message otherwise: a copy then, for the same reason.
    words = np.require(packed.view("<u4"), requirements="A").reshape(len(polynomials), -1)
    words.flags.writeable = False
    _unpack(words, polynomials)
    return residues


def unpack_bytes(packed: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """`unpack` of bytes."""
    return unpack(np.frombuffer(packed, np.uint8), shape)
