"""Plans: how tokens, input channels and output rows share one polynomial, and which plan is cheapest.

Plan (T', d', r'): token t, channel i of a block at coefficient T'·i + t; weight row j, channel i at T'·(j·d'
+ d' - 1 - i); coefficient T'·(j·d' + d' - 1) + t of the product is the inner product of token t and row j.
Weights are polynomials in X^T', so their transforms hold only N / T' different values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.errors import InvalidInputError

MAX_DEGREE = 8192
MAX_OUTPUTS = 128
"""Wanted coefficients per response. More would let a malformed public key read the mask out."""
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MAX_ROWS = 4 * 128
MAX_CHANNELS = 1 << 17

_IDENTIFIER = re.compile(r"t([1-9]\d{0,3})\.c([1-9]\d{0,3})\.r([1-9]\d{0,2})")

# Rounded microseconds on one core of an uploaded ciphertext, made, sent (48 KiB) and expanded again; of a response
# ciphertext, made, sent (16 KiB) and decrypted; of one product with a weight polynomial. Only their ratios decide.
# benchmarks/he_kernels.py measures them anew; reports/he_kernels.txt has uploads and products dearer than this.
UPLOAD_COST = 100.0
DOWNLOAD_COST = 75.0
PRODUCT_COST = 2.0


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
        if self.tokens * self.channels * self.rows > MAX_DEGREE:
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
        """Raises InvalidInputError if the plan does not fit into one polynomial of this parameter set."""
        if self.tokens * self.channels * self.rows > parameters.degree:
            raise InvalidInputError(
                f"plan {self.identifier} exceeds the ring degree {parameters.degree} of {parameters.name}"
            )

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
        """Weight polynomials of this plan; each is 4 N / T' bytes and prime in memory."""
        return self.blocks(d_in) * self.row_groups(rows)

    def cost(self, tokens: int, d_in: int, rows: int) -> float:
        """Modelled microseconds of one call, both sides."""
        return (
            UPLOAD_COST * self.uploads(tokens, d_in)
            + DOWNLOAD_COST * self.downloads(tokens, rows)
            + PRODUCT_COST * self.chunks(tokens) * self.polynomials(d_in, rows)
        )


def compile_plans(
    parameters: ParameterSet, d_in: int, rows: int, token_counts: Sequence[int] = TOKEN_COUNTS
) -> tuple[Plan, ...]:
    """One plan for each of these numbers of tokens in flight: decode, small batches, prefill. Sorted, without
    repeats.

    Each plan needs about 12 bytes of memory per weight.
    """
    if not (1 <= d_in <= MAX_CHANNELS and 1 <= rows <= MAX_ROWS):
        raise InvalidInputError(f"a group has 1 to {MAX_CHANNELS} channels and 1 to {MAX_ROWS} rows")
    return tuple(sorted({_best(parameters.degree, tokens, d_in, rows) for tokens in token_counts}))


def _best(degree: int, tokens: int, d_in: int, rows: int) -> Plan:
    candidates = set()
    for plan_rows in range(1, min(rows, MAX_OUTPUTS // tokens) + 1):
        widest = min(degree // (tokens * plan_rows), d_in)
        # Multiples of 32 let the inverse transform skip most of its work.
        for channels in {widest, max(widest // 32 * 32, 1)}:
            blocks = -(-d_in // channels)
            rounded = (d_in + 32 * blocks - 1) // (32 * blocks) * 32
            narrowest = rounded if tokens * rounded * plan_rows <= degree else channels
            candidates.add(Plan(tokens, narrowest, -(-rows // -(-rows // plan_rows))))
    return min(candidates, key=lambda plan: (plan.cost(tokens, d_in, rows), plan.channels % 32 != 0, plan))


def select_plan(plans: Sequence[Plan], parameters: ParameterSet, tokens: int, d_in: int, rows: int) -> Plan:
    """The cheapest of ``plans`` for this many tokens. Raises InvalidInputError if there is none."""
    if not plans or tokens < 1:
        raise InvalidInputError("need at least one plan and one token")
    return min(plans, key=lambda plan: (plan.cost(tokens, d_in, rows), plan))
