"""The multiply-accumulate's inner bodies, as numba intrinsics on sixteen lanes.

Products of 30-bit residues are summed in 64 bits and reduced once for every sixteen (P. Montgomery, "Modular
multiplication without trial division", 1985): the weights carry the factor 2**32 that the reduction divides by.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tensorguard.ckks.lanes import HIGH, I64, LANES, LOW, SHIFT, V32, V64, Lanes, splat32, splat64

SEGMENT = 64
"""Coefficients that the multiply-accumulate handles at once."""
GATHERED = 4 * SEGMENT
"""Values that `gather_segment` leaves for one pair of inputs."""
MAX_PRODUCTS = 16
"""Products of two 30-bit residues that fit an unsigned 64-bit sum."""
PREFETCH = 2048
"""How many weights ahead are asked for: those of a model come from memory, once each and in order."""


@intrinsic
def gather_segment(typing_context: Any, source: Any, source_offset: Any, target: Any, target_offset: Any) -> Any:
    """Copy SEGMENT values from ``source[source_offset:]`` to ``target[target_offset:]``, and behind them the same with
    every odd lane in the place of the even one before it: a 64-bit multiplication reads even lanes only.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        source, source_offset, target, target_offset = arguments
        source_at = lanes.pointer(signature.args[0], source, source_offset)
        target_at = lanes.pointer(signature.args[2], target, target_offset)
        for start in range(0, SEGMENT, LANES):
            value = lanes.load(source_at, ir.Constant(I64, start))
            lanes.store(value, target_at, ir.Constant(I64, start))
            lanes.store(lanes.odd(value), target_at, ir.Constant(I64, SEGMENT + start))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@intrinsic
def multiply_accumulate(
    typing_context: Any,
    sums: Any,
    sums_offset: Any,
    sums_stride: Any,
    weights: Any,
    weights_offset: Any,
    inputs: Any,
    count: Any,
    prime: Any,
    inverse: Any,
) -> Any:
    """Σ_k weights_k · b_k / 2**32 (and · a_k), k < count, below 2p, to SEGMENT lanes of two sums.

    ``weights_k = weights[weights_offset + SEGMENT k :]``; b_k and then a_k are at ``inputs[GATHERED k :]`` as
    `gather_segment` leaves them; all are below p. The sums go to ``sums[sums_offset :]`` for b and ``sums_stride``
    further for a. ``inverse`` is 1/p modulo 2**32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        sums, sums_offset, sums_stride, weights, weights_offset, inputs, count, prime, inverse = arguments
        kinds = signature.args
        sums_at = lanes.pointer(kinds[0], sums, sums_offset)
        weights_at = lanes.pointer(kinds[3], weights, weights_offset)
        inputs_at = lanes.pointer(kinds[5], inputs, ir.Constant(I64, 0))
        vectors = range(SEGMENT // LANES)
        # LLVM keeps all of these in registers.
        halves = [(vector, which, half) for vector in vectors for which in range(2) for half in range(2)]
        accumulators = {key: cgutils.alloca_once(builder, V64) for key in halves}
        totals = {
            (vector, which): cgutils.alloca_once_value(builder, splat32(0)) for vector in vectors for which in range(2)
        }

        def multiply(index: Any) -> None:
            weight_at = builder.mul(index, ir.Constant(I64, SEGMENT))
            input_at = builder.mul(index, ir.Constant(I64, GATHERED))
            for vector in vectors:
                place = builder.add(weight_at, ir.Constant(I64, LANES * vector))
                weight = lanes.load(weights_at, place)
                lanes.prefetch(weights_at, builder.add(place, ir.Constant(I64, PREFETCH)))
                for half, factor in enumerate((lanes.even(weight), lanes.odd(weight))):
                    for which in range(2):
                        start = (2 * which + half) * SEGMENT + LANES * vector
                        value = lanes.load(inputs_at, builder.add(input_at, ir.Constant(I64, start)))
                        slot = accumulators[vector, which, half]
                        product = builder.mul(lanes.even(value), factor)
                        builder.store(builder.add(builder.load(slot), product), slot)

        prime_lanes = lanes.splat(prime)
        double = builder.add(prime_lanes, prime_lanes)
        wide_prime, wide_inverse = lanes.even(prime_lanes), lanes.even(lanes.splat(inverse))
        half_range = builder.shl(wide_prime, splat64(33))

        def divide(total: Any) -> Any:
            """A total of 16 products, so below 2**34 p, to total / 2**32 mod p: in (-p, 2p), in the high word."""
            reduced = builder.sub(total, half_range)
            total = builder.select(builder.icmp_unsigned("<", total, reduced), total, reduced)
            quotient = builder.and_(builder.mul(builder.and_(total, LOW), wide_inverse), LOW)
            return builder.sub(total, builder.mul(quotient, wide_prime))

        limit = ir.Constant(I64, MAX_PRODUCTS)
        batches = builder.udiv(builder.add(count, ir.Constant(I64, MAX_PRODUCTS - 1)), limit)
        with cgutils.for_range(builder, batches) as batch:
            first = builder.mul(batch.index, limit)
            left = builder.sub(count, first)
            for slot in accumulators.values():
                builder.store(splat64(0), slot)
            some = builder.select(builder.icmp_signed("<", left, limit), left, limit)
            with cgutils.for_range(builder, some) as loop:
                multiply(builder.add(first, loop.index))
            for (vector, which), slot in totals.items():
                even, odd = (divide(builder.load(accumulators[vector, which, half])) for half in range(2))
                merged = builder.or_(builder.lshr(even, SHIFT), builder.and_(odd, HIGH))
                value = lanes.reduce_once(builder.add(builder.bitcast(merged, V32), prime_lanes), double)
                builder.store(lanes.reduce_once(builder.add(builder.load(slot), value), double), slot)
        for (vector, which), slot in totals.items():
            position = builder.add(builder.mul(sums_stride, ir.Constant(I64, which)), ir.Constant(I64, LANES * vector))
            lanes.store(builder.load(slot), sums_at, position)
        return context.get_dummy_value()

    index, word = types.intp, types.uint32
    return types.void(sums, index, index, weights, index, inputs, index, word, word), generate
