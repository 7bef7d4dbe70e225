"""Public constants of a parameter set in the form the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.arrays import aligned_empty
from tensorguard.ckks.ntt import shoup, tables
from tensorguard.ckks.parameters import ParameterSet

Residues = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """Arrays are read-only and shared.

    With L primes: primes uint32 [L]; factors uint32 [L, N / 4096, 3, 2, 4096] (see `ntt.tables`); constants uint32
    [L, 5]: p, 2**32 mod p, its Shoup quotient, floor(2**32 / p), 1/p mod 2**32; drops uint32 [L, L, 2] for the modulus
    switch: 1/p_k mod p_i at [k, i] for i < k, and its Shoup quotient; flood_offset uint32 [L]: -2**(flood_bits + 1)
    mod p.
    """

    primes: Residues
    factors: Residues
    constants: Residues
    drops: Residues
    flood_offset: Residues

    def scale(self, value: int) -> Residues:
        """uint32 [L, 2]: ``value`` modulo each prime, and the Shoup quotient."""
        return _with_quotient([(value % int(p), int(p)) for p in self.primes])

    def with_quotient(self, polynomial: Residues) -> Residues:
        """uint32 [L, 2, N] of reduced [L, N]: the operand and its Shoup quotients."""
        result = aligned_empty(len(self.primes), 2, polynomial.shape[-1])
        result[:, 0] = polynomial
        for index, prime in enumerate(self.primes):
            result[index, 1] = shoup(polynomial[index], int(prime))
        return result


def _with_quotient(pairs: list[tuple[int, int]]) -> Residues:
    return np.array([[value, (value << 32) // prime] for value, prime in pairs], np.uint32)


@lru_cache(maxsize=8)
def ring(parameters: ParameterSet) -> Ring:
    """The constants of this parameter set."""
    primes = parameters.primes
    words = [(2**32 % p, p) for p in primes]
    drops = np.zeros((len(primes), len(primes), 2), np.uint32)
    for last in range(1, len(primes)):
        drops[last, :last] = _with_quotient([(pow(primes[last], -1, p), p) for p in primes[:last]])
    result = Ring(
        primes=np.array(primes, np.uint32),
        factors=tables(primes, parameters.degree),
        constants=np.array(
            [[p, word, (word << 32) // p, 2**32 // p, pow(p, -1, 2**32)] for (word, p) in words],
            np.uint32,
        ),
        drops=drops,
        flood_offset=np.array([-(2 ** (parameters.flood_bits + 1)) % p for p in primes], np.uint32),
    )
    for array in (result.primes, result.constants, result.drops, result.flood_offset):
        array.flags.writeable = False
    return result
