"""Residues in and out of OpenFHE's objects, through their binary serialisation.

The Python module does not show the residues of a polynomial. In the serialised form they are plain little-endian
uint64 vectors, each preceded by its length: for each polynomial one vector per prime.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.errors import ConfigurationError


@dataclass(frozen=True, slots=True, repr=False)
class Template:
    """A serialised object, and where its vectors of ``degree`` residues are. Everything else in it is kept."""

    data: bytes
    offsets: tuple[int, ...]
    degree: int

    @classmethod
    def of(cls, data: bytes, primes: tuple[int, ...], degree: int) -> Template:
        """Of an object of two polynomials. Raises ConfigurationError if it is not serialised as expected."""
        return cls(data, _offsets(data, primes, degree), degree)

    def write(self, residues: npt.NDArray[np.uint32]) -> bytes:
        """The object with these residues [2, primes, N], in OpenFHE's order."""
        data = bytearray(self.data)
        for offset, row in zip(self.offsets, residues.reshape(-1, self.degree), strict=True):
            np.frombuffer(data, "<u8", self.degree, offset)[:] = row
        return bytes(data)


def read(data: bytes, primes: tuple[int, ...], degree: int) -> npt.NDArray[np.uint64]:
    """uint64 [2, primes, N] of a serialised object of two polynomials, in OpenFHE's order.

    Raises ConfigurationError if it is not serialised as expected.
    """
    rows = [np.frombuffer(data, "<u8", degree, offset) for offset in _offsets(data, primes, degree)]
    return np.stack(rows).reshape(2, len(primes), degree)


def _offsets(data: bytes, primes: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """The beginnings of the vectors. What is around them depends on which object came from where."""
    length, at = degree.to_bytes(8, "little"), 0
    offsets: list[int] = []
    while (at := data.find(length, at)) >= 0:
        start, end = at + len(length), at + len(length) + 8 * degree
        prime = primes[len(offsets) % len(primes)]
        if end <= len(data) and np.frombuffer(data, "<u8", degree, start).max() < prime:
            offsets.append(start)
            at = end
        else:
            at += 1
    if len(offsets) != 2 * len(primes):
        raise ConfigurationError(
            "this version of openfhe serialises polynomials in an unknown form: install the version that "
            "pip install 'tensafe[openfhe]' chooses, or choose --backend cpu"
        )
    return tuple(offsets)
