"""Which plan is cheapest, and which plans a group keeps transformed weights for.

The choice is a search over all plans that can be best under a cost model; the model's constants are measured
(`benchmarks/planner.py --measure`), and the same benchmark compares the choice with every plan, timed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import MAX_CHANNELS, MAX_OUTPUTS, MAX_ROWS, TOKEN_COUNTS, Plan
from tensorguard.errors import InvalidInputError

MAX_CHUNK_BYTES = 15 * 1024 * 1024
"""One chunk's request, and its response, must fit a frame (16 MiB)."""
DEFAULT_GROUP_MEMORY = 64 * 1024 * 1024
"""Bytes of transformed weights of one group, unless two plans of it need more: room for a plan for each number of
tokens in groups of up to 800,000 weights."""
GOOD_ENOUGH = 1.02
"""A plan is not worth its memory where another one in use costs at most this much more."""

_ID_AND_SEED_BYTES = 40
_BITS_PER_RESIDUE = 30


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds of one core, both sides together. All but the last two are for N = 4096 and three primes, and
    grow with the residues of a polynomial; those of a transform are for one prime.
    """

    transform: float
    """One transform of 4096 residues."""
    upload: float
    """A ciphertext but for its transforms: error, encoding, expansion on both sides, checks."""
    response: float
    """A response ciphertext but for its transforms: its encryption of zero, modulus switch, decryption."""
    product: float
    """A ciphertext times a weight polynomial, added up."""
    link_byte: float
    """Sending a byte, either way."""
    call: float
    """What a call costs under any plan."""


MEASURED = Costs(transform=7.5, upload=95.0, response=112.0, product=2.5, link_byte=0.002, call=225.0)
"""The link is that of inline frames over loopback: 0.7 ms for 340 KB more in `benchmarks/transport.py`."""
"""By `benchmarks/planner.py --measure` on one core of a Xeon of 2.8 GHz with AVX-512; a link of a gigabyte a second."""


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one call under a plan takes. ``transforms`` counts primes apart, memory is the group's transformed weights
    under this plan, and the microseconds are modelled: both sides' work on uploads, on responses, on products, the
    bytes on the link, and what does not depend on the plan.
    """

    plan: Plan
    uploads: int
    downloads: int
    products: int
    transforms: int
    bytes_up: int
    bytes_down: int
    memory_bytes: int
    upload_us: float
    response_us: float
    product_us: float
    link_us: float
    call_us: float

    @property
    def microseconds(self) -> float:
        """The whole modelled time."""
        return self.upload_us + self.response_us + self.product_us + self.link_us + self.call_us


def call_cost(
    plan: Plan, parameters: ParameterSet, tokens: int, d_in: int, rows: int, costs: Costs = MEASURED
) -> CallCost:
    """What ``tokens`` tokens through a group of ``rows`` x ``d_in`` take under this plan."""
    primes = len(parameters.primes)
    uploads, downloads = plan.uploads(tokens, d_in), plan.downloads(tokens, rows)
    products = plan.chunks(tokens) * plan.polynomials(d_in, rows)
    polynomial_bytes = parameters.degree * _BITS_PER_RESIDUE // 8
    bytes_up = uploads * (primes * polynomial_bytes + _ID_AND_SEED_BYTES)
    bytes_down = downloads * polynomial_bytes + 4 * tokens * rows
    # Of a response: u forward, c1 back, c0 back where it is wanted; at the host c1 forward, c1·s back where wanted.
    full, pruned = 2 * primes + 1, primes + 1
    transform = costs.transform * parameters.degree / 4096
    size = primes * parameters.degree / (3 * 4096)
    return CallCost(
        plan=plan,
        uploads=uploads,
        downloads=downloads,
        products=products,
        transforms=uploads * primes + downloads * (full + pruned),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        memory_bytes=plan.weight_bytes(parameters, d_in, rows),
        upload_us=uploads * (size * costs.upload + primes * transform),
        response_us=downloads * (size * costs.response + (full + pruned * _pruned_share(plan, parameters)) * transform),
        product_us=products * size * costs.product,
        link_us=costs.link_byte * (bytes_up + bytes_down),
        call_us=costs.call,
    )


def _pruned_share(plan: Plan, parameters: ParameterSet) -> float:
    """Work of the inverse transform that yields wanted coefficients only: each skipped stage halves what follows."""
    stages = parameters.degree.bit_length() - 1
    keep, skip = plan.skip
    return (keep + 2.0 - 2.0 ** (1 - skip) + (stages - keep - skip) * 2.0**-skip) / stages


@lru_cache(maxsize=256)
def candidate_plans(parameters: ParameterSet, d_in: int, rows: int) -> tuple[Plan, ...]:
    """Every plan that can be the cheapest within a memory limit, for whatever costs. Sorted.

    For a T' and a number of row groups the smallest r' leaves most room for channels. For an alignment of d' (which
    shortens the pruned transforms) the fewest blocks are best, and the smallest d' for them is as good as any.

    Raises InvalidInputError for a matrix outside the limits, or so large that no call fits a frame.
    """
    if not (1 <= d_in <= MAX_CHANNELS and 1 <= rows <= MAX_ROWS):
        raise InvalidInputError(f"a group has 1 to {MAX_CHANNELS} channels and 1 to {MAX_ROWS} rows")
    found = set()
    for plan_tokens in TOKEN_COUNTS:
        most_rows = min(rows, MAX_OUTPUTS // plan_tokens)
        for plan_rows in sorted({-(-rows // -(-rows // count)) for count in range(1, most_rows + 1)}):
            widest = parameters.degree // (plan_tokens * plan_rows)
            for alignment in (1 << bit for bit in range(widest.bit_length())):
                blocks = -(-d_in // (widest // alignment * alignment))
                channels = -(-d_in // (blocks * alignment)) * alignment
                plan = Plan(plan_tokens, channels, plan_rows)
                if plan.chunk_bytes(parameters, d_in, rows) <= MAX_CHUNK_BYTES:
                    found.add(plan)
    if not found:
        raise InvalidInputError(
            f"no plan cuts a matrix of {rows} x {d_in} into calls that fit a frame: it is too large"
        )
    return tuple(sorted(found))


def rank_plans(
    parameters: ParameterSet,
    tokens: int,
    d_in: int,
    rows: int,
    memory_limit: int | None = None,
    costs: Costs = MEASURED,
) -> list[CallCost]:
    """Candidates for this many tokens, cheapest first, whose weights take at most ``memory_limit`` bytes.

    Raises InvalidInputError if there is none: it names the smallest limit that would do.
    """
    if tokens < 1:
        raise InvalidInputError("need at least one token")
    limit = default_memory_limit(parameters, d_in, rows) if memory_limit is None else memory_limit
    priced = [
        call_cost(plan, parameters, tokens, d_in, rows, costs) for plan in candidate_plans(parameters, d_in, rows)
    ]
    fitting = [cost for cost in priced if cost.memory_bytes <= limit]
    if not fitting:
        raise InvalidInputError(_too_small(parameters, d_in, rows, limit))
    return sorted(fitting, key=lambda cost: (cost.microseconds, cost.plan))


def _too_small(parameters: ParameterSet, d_in: int, rows: int, limit: int) -> str:
    least = _least_memory(parameters, d_in, rows)
    return (
        f"a memory limit of {limit} bytes has room for no plan of a group of {rows} x {d_in}: "
        f"allow it at least {least} bytes, or pack an adapter of smaller rank"
    )


def default_memory_limit(parameters: ParameterSet, d_in: int, rows: int) -> int:
    """Bytes of transformed weights that a group may take unless its packer says otherwise."""
    two_plans = 2 * 4 * len(parameters.primes) * d_in * rows
    # Where a matrix does not fill its polynomials, a plan takes more than its weights.
    return max(DEFAULT_GROUP_MEMORY, two_plans + two_plans // 4)


def share_memory(parameters: ParameterSet, shapes: Sequence[tuple[int, int]], memory_limit: int | None) -> list[int]:
    """The limit of each group (d_in, rows) of an adapter that may hold ``memory_limit`` bytes of transformed weights
    in all, None for the default of each. Shares are in proportion to the least that each group needs.

    Raises InvalidInputError if the limit is below the sum of these.
    """
    if memory_limit is None:
        return [default_memory_limit(parameters, *shape) for shape in shapes]
    least = [_least_memory(parameters, *shape) for shape in shapes]
    if memory_limit < sum(least):
        raise InvalidInputError(
            f"a memory limit of {memory_limit} bytes has no room for a plan of every group: allow the adapter at least "
            f"{sum(least)} bytes, or seal one of smaller rank"
        )
    return [memory_limit * needed // sum(least) for needed in least]


@lru_cache(maxsize=256)
def _least_memory(parameters: ParameterSet, d_in: int, rows: int) -> int:
    return min(plan.weight_bytes(parameters, d_in, rows) for plan in candidate_plans(parameters, d_in, rows))


def compile_plans(
    parameters: ParameterSet,
    d_in: int,
    rows: int,
    token_counts: Sequence[int] = TOKEN_COUNTS,
    memory_limit: int | None = None,
) -> tuple[Plan, ...]:
    """The plans a group is packed with: for each of these numbers of tokens in flight (decode, small batches,
    prefill) one that is cheapest or nearly so, all together within ``memory_limit`` bytes of transformed weights
    (default: `default_memory_limit`). Sorted, without repeats.

    Plans are added or exchanged one at a time, always for the largest gain, until no number of tokens is more than
    2 % from its best plan, or the memory has room for no better set. Raises InvalidInputError if the limit has no
    room for any plan.
    """
    limit = default_memory_limit(parameters, d_in, rows) if memory_limit is None else memory_limit
    return _compile(parameters, d_in, rows, tuple(token_counts), limit)


@lru_cache(maxsize=256)
def _compile(
    parameters: ParameterSet, d_in: int, rows: int, token_counts: tuple[int, ...], limit: int
) -> tuple[Plan, ...]:
    if not token_counts or min(token_counts) < 1:
        raise InvalidInputError("need at least one number of tokens, each at least 1")
    pool = candidate_plans(parameters, d_in, rows)
    memory = {plan: plan.weight_bytes(parameters, d_in, rows) for plan in pool}
    times = {
        plan: [call_cost(plan, parameters, tokens, d_in, rows).microseconds for tokens in token_counts] for plan in pool
    }
    best = [min(column) for column in zip(*times.values(), strict=True)]
    # How many times slower than the best plan for each number of tokens.
    slower = {plan: [time / least for time, least in zip(times[plan], best, strict=True)] for plan in pool}

    uses = [_use(tokens) for tokens in token_counts]
    weights = [1.0 / uses.count(use) for use in uses]

    def reached(plans: Sequence[Plan]) -> list[float]:
        return [min(column) for column in zip(*(slower[plan] for plan in plans), strict=True)]

    def loss(plans: Sequence[Plan]) -> tuple[float, int]:
        # Squares: one number of tokens that goes badly counts more than several that go a little worse.
        slowness = sum(weight * ratio**2 for weight, ratio in zip(weights, reached(plans), strict=True))
        return slowness, sum(memory[plan] for plan in plans)

    chosen: list[Plan] = []
    while not chosen or max(reached(chosen)) > GOOD_ENOUGH:
        # One more plan, or one in place of another.
        bases = [chosen, *([plan for plan in chosen if plan != left_out] for left_out in chosen)]
        options = [
            [*base, plan]
            for base in bases
            for plan in pool
            if sum(memory[kept] for kept in base) + memory[plan] <= limit
        ]
        better = min(options, key=loss, default=None)
        if better is None or (chosen and loss(better)[0] >= loss(chosen)[0]):
            break
        least = reached(better)
        chosen = [plan for plan in better if any(map(operator.eq, slower[plan], least))]
    if not chosen:
        raise InvalidInputError(_too_small(parameters, d_in, rows, limit))
    return tuple(sorted(chosen))


def _use(tokens: int) -> str:
    """Decode of one sequence, small batches and prefill count alike, however many numbers of tokens each has."""
    return "decode" if tokens == 1 else "small batch" if tokens <= 16 else "prefill"


def select_plan(plans: Sequence[Plan], parameters: ParameterSet, tokens: int, d_in: int, rows: int) -> Plan:
    """The cheapest of ``plans`` for this many tokens. Raises InvalidInputError if there is none."""
    if not plans or tokens < 1:
        raise InvalidInputError("need at least one plan and one token")
    return _select(tuple(plans), parameters, tokens, d_in, rows)


@lru_cache(maxsize=4096)
def _select(plans: tuple[Plan, ...], parameters: ParameterSet, tokens: int, d_in: int, rows: int) -> Plan:
    return min(plans, key=lambda plan: (call_cost(plan, parameters, tokens, d_in, rows).microseconds, plan))
