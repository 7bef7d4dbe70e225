"""Public constants of a parameter set in the form the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.ntt import shoup, tables
from tensorguard.ckks.parameters import ParameterSet

Residues = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """Arrays are read-only and shared.

    primes uint32 [3]; factors uint32 [3, 3, 2, 4096] (see `ntt.tables`); constants uint32 [3, 4]: p, 2**32
    mod p, its Shoup quotient, floor(2**32 / p); drops uint32 [3, 2] for the modulus switch: 1/p2 mod p0, 1/p2
    mod p1, 1/p1 mod p0; flood_offset uint32 [3]: -2**65 mod p.
    """

    primes: Residues
    factors: Residues
    constants: Residues
    drops: Residues
    flood_offset: Residues

    def scale(self, value: int) -> Residues:
        """uint32 [3, 2]: ``value`` modulo each prime, and the Shoup quotient."""
        return _with_quotient([(value % int(p), int(p)) for p in self.primes])

    def with_quotient(self, polynomial: Residues) -> Residues:
        """uint32 [3, 2, 4096] of reduced [3, 4096]: the operand and its Shoup quotients."""
        result = np.empty((len(self.primes), 2, polynomial.shape[-1]), np.uint32)
        result[:, 0] = polynomial
        for index, prime in enumerate(self.primes):
            result[index, 1] = shoup(polynomial[index], int(prime))
        return result


def _with_quotient(pairs: list[tuple[int, int]]) -> Residues:
    return np.array([[value, (value << 32) // prime] for value, prime in pairs], np.uint32)


@lru_cache(maxsize=8)
def ring(parameters: ParameterSet) -> Ring:
    """The constants of this parameter set."""
    p0, p1, p2 = parameters.primes
    words = [(2**32 % p, p) for p in parameters.primes]
    result = Ring(
        primes=np.array(parameters.primes, np.uint32),
        factors=tables(parameters.primes),
        constants=np.array(
            [[p, word, (word << 32) // p, 2**32 // p] for (word, p) in words],
            np.uint32,
        ),
        drops=_with_quotient([(pow(p2, -1, p0), p0), (pow(p2, -1, p1), p1), (pow(p1, -1, p0), p0)]),
        flood_offset=np.array([-(2**65) % p for p in parameters.primes], np.uint32),
    )
    for array in (result.primes, result.constants, result.drops, result.flood_offset):
        array.flags.writeable = False
    return result
