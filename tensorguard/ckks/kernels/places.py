"""Where a plan puts messages and finds products."""

# numba compiles these from the types it sees, so they carry no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
from __future__ import annotations

from tensorguard.ckks.compiled import inlined
from tensorguard.ckks.ntt import pruned_position


@inlined
def place_message(mantissas, plan, index, message, degree):
    """Write a ciphertext's mantissas to the coefficients of the plan, and zeros to the others."""
    tokens, channels = mantissas.shape
    plan_tokens, plan_channels, _ = plan
    blocks = (channels + plan_channels - 1) // plan_channels
    chunk, block = index // blocks, index % blocks
    first_token, first_channel = chunk * plan_tokens, block * plan_channels
    width = min(plan_channels, channels - first_channel)
    for n in range(degree):
        message[n] = 0
    for token in range(min(plan_tokens, tokens - first_token)):
        row = mantissas[first_token + token, first_channel : first_channel + width]
        for n in range(width):
            message[n * plan_tokens + token] = row[n]


@inlined
def wanted_position(token, row, plan, skip):
    """Where the pruned inverse leaves the product of this token and row: coefficient T'(j d' + d' - 1) + t."""
    tokens, channels, _ = plan
    return pruned_position(tokens * (row * channels + channels - 1) + token, skip[0], skip[1])
