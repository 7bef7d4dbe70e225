"""Named parameter sets of the ring, each checked against its security bound.

Bounds on log2 q are those of the Homomorphic Encryption Standard (homomorphicencryption.org, 2018, table 1)
for a uniform ternary secret, 128-bit classical, and of its post-quantum table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tensorguard.errors import ConfigurationError

MANTISSA_BITS = 30
"""Fixed-point bits of one normalised activation."""

TERNARY = "uniform ternary"
CENTRED_BINOMIAL = "centred binomial"
ERROR_VARIANCE = 10.5
"""What the samplers make; a set that states anything else is refused."""

_BOUNDS = {4096: (109, 101), 8192: (218, 202)}
_LARGEST_FLOOD = 2.0**-10
"""Of p0, after the modulus switch: inner products leave a tenth of the range, the host accepts 0.46 of it."""


@dataclass(frozen=True, slots=True)
class ParameterSet:
    """Everything both sides must agree on. Public.

    ``primes[0]`` is the prime that a response keeps; the others are dropped from the last to the second.
    ``error_variance`` is that of the error, ``flood_bits`` the width of each of the four uniform integers whose sum
    floods a response, ``weight_bits`` the fixed-point width w of adapter weights. The security bounds are the largest
    log2 q for 128-bit security at this degree. Raises ConfigurationError for a set over a bound, or one that the
    engine cannot compute with.
    """

    name: str
    degree: int
    primes: tuple[int, ...]
    error_variance: float
    flood_bits: int
    weight_bits: int
    security_bound_classical: int
    security_bound_quantum: int
    secret_distribution: str = TERNARY
    error_distribution: str = CENTRED_BINOMIAL

    def __post_init__(self) -> None:
        if self.degree not in _BOUNDS:
            raise ConfigurationError(f"ring degree {self.degree} is not supported; use one of {sorted(_BOUNDS)}")
        bounds = _BOUNDS[self.degree]
        if (self.security_bound_classical, self.security_bound_quantum) != bounds:
            raise ConfigurationError(f"security bounds at degree {self.degree} are {bounds}")
        if self.modulus_bits > min(bounds):
            raise ConfigurationError(
                f"log2 q = {self.modulus_bits:.1f} exceeds {min(bounds)}, the bound for 128-bit security "
                f"at degree {self.degree}; use fewer or smaller primes"
            )
        if len(set(self.primes)) != len(self.primes) or not 3 <= len(self.primes) <= 5:
            raise ConfigurationError("a parameter set has three to five distinct primes")
        if any(not 2**29 < p < 2**30 or p % (2 * self.degree) != 1 or not _is_prime(p) for p in self.primes):
            raise ConfigurationError("primes must have 30 bits and be 1 modulo twice the ring degree")
        made = (TERNARY, CENTRED_BINOMIAL, ERROR_VARIANCE)
        if (self.secret_distribution, self.error_distribution, self.error_variance) != made:
            raise ConfigurationError(
                f"the samplers make a {made[0]} secret and a {made[1]} error of variance {made[2]}"
            )
        if not 64 <= self.flood_bits <= 120 or 2.0 ** (self.flood_bits + 1) > _LARGEST_FLOOD * self.modulus:
            raise ConfigurationError("flood_bits must be 64 to 120, and leave room in q for the inner products")
        if not 12 <= self.weight_bits <= 16:
            raise ConfigurationError("weight_bits must be 12 to 16")

    @property
    def modulus(self) -> int:
        return math.prod(self.primes)

    @property
    def modulus_bits(self) -> float:
        return math.log2(self.modulus)

    @property
    def dropped(self) -> int:
        """What the modulus switch of a response divides by: every prime but the first."""
        return self.modulus // self.primes[0]

    @property
    def depth(self) -> int:
        """Products in a row that the set allows, all by plaintext polynomials: one. The first already takes the scale
        to the top of q (`scale`), and its modulus switch leaves one prime.
        """
        return 1

    @property
    def precision_bits(self) -> float:
        """How many bits the largest inner product stands above the standard deviation that encryption adds to it."""
        return -math.log2(self.noise(1.0))

    @property
    def flood_variance(self) -> float:
        """Variance of the flood, before the modulus switch (a uniform b-bit integer has 2**2b / 12)."""
        return 2.0 ** (2 * self.flood_bits) / 3.0

    def norm_bound(self, d_in: int, largest_rank: int) -> float:
        """Largest Frobenius norm of a projection's integer weights: 2**w * sqrt(d_in * r_max)."""
        return float(2**self.weight_bits * math.sqrt(d_in * largest_rank))

    def noise(self, norm_bound: float) -> float:
        """Standard deviation of what encryption adds to one decrypted W·m, relative to |m|, in units of the integer
        weights: the flood and the rounding of c1, both after the modulus switch (docs/protocol.md, "Precision").
        """
        flood = self.flood_variance / float(self.dropped) ** 2
        rounding = (1.0 + 2.0 * self.degree / 3.0) / 12.0
        return math.sqrt(flood + rounding) * norm_bound / (0.45 * self.primes[0])

    def scale(self, norm_bound: float) -> int:
        """Δ: what one unit of the 2**30 fixed-point activation becomes in Z_q. No inner product can wrap (0.9
        q/2).
        """
        if not (math.isfinite(norm_bound) and norm_bound >= 1.0):
            raise ConfigurationError("norm_bound must be a finite number of at least 1")
        numerator, denominator = norm_bound.as_integer_ratio()
        scale = 9 * (self.modulus // 2) * denominator // (10 * numerator << MANTISSA_BITS)
        if scale < 2**24:
            raise ConfigurationError(f"norm_bound {norm_bound:.3g} leaves no room above the flood; use smaller groups")
        return scale


def _is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin; bases 2, 3, 5, 7 suffice below 3.2e9 (Jaeschke 1993)."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        x = pow(base, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def _family(name: str, degree: int, primes: tuple[int, ...], flood_bits: int) -> list[ParameterSet]:
    """The sets that differ in weight bits alone."""
    classical, quantum = _BOUNDS[degree]
    return [
        ParameterSet(
            name=f"{name}-w{weight_bits}",
            degree=degree,
            primes=primes,
            error_variance=ERROR_VARIANCE,
            flood_bits=flood_bits,
            weight_bits=weight_bits,
            security_bound_classical=classical,
            security_bound_quantum=quantum,
        )
        for weight_bits in range(12, 17)
    ]


PARAMETER_SETS: Mapping[str, ParameterSet] = MappingProxyType(
    {
        parameters.name: parameters
        for family in (
            _family("n4096-q90", 4096, (1073692673, 1073668097, 1073651713), 64),
            _family("n8192-q150", 8192, (1073692673, 1073643521, 1073479681, 1073430529, 1073299457), 112),
        )
        for parameters in family
    }
)
DEFAULT_PARAMETER_SET = "n4096-q90-w12"


def get_parameter_set(name: str) -> ParameterSet:
    """The parameter set of this name. Raises ConfigurationError if there is none."""
    try:
        return PARAMETER_SETS[name]
    except KeyError:
        raise ConfigurationError(
            f"unknown parameter set {name!r}; choose one of {', '.join(sorted(PARAMETER_SETS))}"
        ) from None
