"""Plans: how tokens, input channels and output rows share one polynomial.

Plan (T', d', r'): token t, channel i of a block at coefficient T'·i + t; weight row j, channel i at T'·(j·d'
+ d' - 1 - i); coefficient T'·(j·d' + d' - 1) + t of the product is the inner product of token t and row j.
Weights are polynomials in X^T', so their transforms hold only N / T' different values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.errors import InvalidInputError

MAX_DEGREE = 8192
MAX_OUTPUTS = 128
"""Wanted coefficients per response. More would let a malformed public key read the mask out."""
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MAX_ROWS = 1 << 16
"""Rows of a group. In full mode these are all outputs of a fused layer: 28,672 for gate and up of Llama-3-8B."""
MAX_CHANNELS = 1 << 17

_IDENTIFIER = re.compile(r"t([1-9]\d{0,3})\.c([1-9]\d{0,3})\.r([1-9]\d{0,2})")


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """tokens T', channels d' and rows r' per polynomial. Raises InvalidInputError outside the bounds."""

    tokens: int
    channels: int
    rows: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.channels, self.rows) < 1:
            raise InvalidInputError("a plan needs at least one token, channel and row")
        if self.tokens not in TOKEN_COUNTS:
            raise InvalidInputError(f"a plan's tokens are one of {TOKEN_COUNTS}")
        if self.filled > MAX_DEGREE:
            raise InvalidInputError(f"plan {self.identifier} exceeds the ring degree {MAX_DEGREE}")
        if self.tokens * self.rows > MAX_OUTPUTS:
            raise InvalidInputError(f"plan {self.identifier} asks for more than {MAX_OUTPUTS} outputs per response")

    @property
    def identifier(self) -> str:
        return f"t{self.tokens}.c{self.channels}.r{self.rows}"

    @classmethod
    def parse(cls, identifier: str) -> Plan:
        """The plan with this identifier, e.g. ``t8.c64.r8``."""
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise InvalidInputError("a plan identifier looks like t8.c64.r8")
        return cls(*map(int, match.groups()))

    def check(self, parameters: ParameterSet) -> None:
        """Raise InvalidInputError if the plan does not fit the ring: called wherever plans meet parameters."""
        if self.filled > parameters.degree:
            raise InvalidInputError(
                f"plan {self.identifier} exceeds the ring degree {parameters.degree} of {parameters.name}"
            )

    @property
    def filled(self) -> int:
        """T'·d'·r': coefficients that tokens, channels and rows take up."""
        return self.tokens * self.channels * self.rows

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.tokens, self.channels, self.rows

    @property
    def skip(self) -> tuple[int, int]:
        """For the pruned inverse transform: log2 T', then the trailing zero bits of d', together 12 at most."""
        kept = self.tokens.bit_length() - 1
        return kept, min((self.channels & -self.channels).bit_length() - 1, 12 - kept)

    def blocks(self, d_in: int) -> int:
        return -(-d_in // self.channels)

    def row_groups(self, rows: int) -> int:
        return -(-rows // self.rows)

    def chunks(self, tokens: int) -> int:
        return -(-tokens // self.tokens)

    def uploads(self, tokens: int, d_in: int) -> int:
        """Ciphertexts in a request."""
        return self.chunks(tokens) * self.blocks(d_in)

    def downloads(self, tokens: int, rows: int) -> int:
        """Ciphertexts in a response."""
        return self.chunks(tokens) * self.row_groups(rows)

    def polynomials(self, d_in: int, rows: int) -> int:
        """Weight polynomials of this plan, which are also the products of one chunk."""
        return self.blocks(d_in) * self.row_groups(rows)

    def weight_bytes(self, parameters: ParameterSet, d_in: int, rows: int) -> int:
        """Memory of a group's transformed weights under this plan: uint32, N / T' values a polynomial and prime."""
        per_polynomial = 4 * len(parameters.primes) * parameters.degree // self.tokens
        return self.polynomials(d_in, rows) * per_polynomial

    def chunk_bytes(self, parameters: ParameterSet, d_in: int, rows: int) -> int:
        """Residue bytes of one chunk's request or response, whichever is larger: what a frame must hold at least."""
        up = self.blocks(d_in) * len(parameters.primes) * parameters.degree
        down = self.row_groups(rows) * parameters.degree + self.tokens * rows
        return 4 * max(up, down)
