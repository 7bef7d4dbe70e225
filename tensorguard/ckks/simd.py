"""The transform's inner bodies, as numba intrinsics on sixteen lanes.

Butterflies are Harvey's lazy ones (D. Harvey, "Faster arithmetic for number-theoretic transforms", 2014):
forward values stay below 4p, inverse values below 2p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from tensorguard.ckks.lanes import I64, LANES, Lanes

# Three stages of eight rows: (first row, second row, index of its twiddle) for each butterfly.
_STAGES = (
    tuple((row, row + 4, 0) for row in range(4)),
    tuple((row, row + 2, 1 + (row >> 2)) for row in (0, 1, 4, 5)),
    tuple((row, row + 1, 3 + (row >> 1)) for row in (0, 2, 4, 6)),
)


def _radix8(forward: bool, vector_twiddles: bool, scaled: bool = False) -> Callable[..., Any]:
    """Make the intrinsic ``f(x, offset, stride, twiddles, twiddles_shoup, first, prime)``.

    It runs three butterfly stages on the rows ``x[offset + k * stride :][:16]``, k = 0..7, in place.  The
    seven twiddles are ``twiddles[first + i]`` or, if they differ between lanes, ``twiddles[first + 64 i
    :][:16]``. A scaled inverse also multiplies the outputs that have no twiddle of their own by
    ``twiddles[0]``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        x, offset, stride, twiddles, shoup, first, prime = arguments
        rows_at = lanes.pointer(signature.args[0], x, offset)
        twiddles_at = lanes.pointer(signature.args[3], twiddles, first)
        shoup_at = lanes.pointer(signature.args[4], shoup, first)
        prime_lanes = lanes.splat(prime)
        double = builder.add(prime_lanes, prime_lanes)
        positions = [builder.mul(stride, ir.Constant(stride.type, row)) for row in range(8)]
        rows = [lanes.load(rows_at, position) for position in positions]

        def twiddle(base: Any, index: int) -> Any:
            if vector_twiddles:
                return lanes.load(base, ir.Constant(I64, 64 * index))
            return lanes.splat(builder.load(builder.gep(base, [ir.Constant(I64, index)])))

        factors = [(twiddle(twiddles_at, index), twiddle(shoup_at, index)) for index in range(7)]
        for stage in _STAGES if forward else reversed(_STAGES):
            for first_row, second_row, index in stage:
                a, b = rows[first_row], rows[second_row]
                factor, factor_shoup = factors[index]
                if forward:
                    a = lanes.reduce_once(a, double)
                    product = lanes.multiply_shoup(b, factor, factor_shoup, prime_lanes)
                    rows[first_row] = builder.add(a, product)
                    rows[second_row] = builder.add(builder.sub(a, product), double)
                else:
                    rows[first_row] = lanes.reduce_once(builder.add(a, b), double)
                    difference = builder.add(builder.sub(a, b), double)
                    rows[second_row] = lanes.multiply_shoup(difference, factor, factor_shoup, prime_lanes)
        if scaled:
            zero = ir.Constant(I64, 0)
            base = lanes.pointer(signature.args[3], twiddles, zero)
            base_shoup = lanes.pointer(signature.args[4], shoup, zero)
            scale, scale_shoup = lanes.splat(builder.load(base)), lanes.splat(builder.load(base_shoup))
            for row in range(4):
                rows[row] = lanes.multiply_shoup(rows[row], scale, scale_shoup, prime_lanes)
        for row, position in zip(rows, positions, strict=True):
            lanes.store(row, rows_at, position)
        return context.get_dummy_value()

    def typer(
        typing_context: Any,
        x: Any,
        offset: Any,
        stride: Any,
        twiddles: Any,
        shoup: Any,
        first: Any,
        prime: Any,
    ) -> Any:
        signature = types.void(x, types.intp, types.intp, twiddles, shoup, types.intp, types.uint32)
        return signature, generate

    return intrinsic(typer)


forward_block = _radix8(forward=True, vector_twiddles=False)
forward_lanes = _radix8(forward=True, vector_twiddles=True)
inverse_block = _radix8(forward=False, vector_twiddles=False)
inverse_block_scaled = _radix8(forward=False, vector_twiddles=False, scaled=True)
inverse_lanes = _radix8(forward=False, vector_twiddles=True)


@intrinsic
def split_pair(
    typing_context: Any,
    x: Any,
    first: Any,
    second: Any,
    twiddles: Any,
    shoup: Any,
    at: Any,
    prime: Any,
) -> Any:
    """One forward butterfly with one factor, ``twiddles[at]``, on ``x[first:][:16]`` and ``x[second:][:16]``, in
    place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        x, first, second, twiddles, shoup, at, prime = arguments
        origin = lanes.pointer(signature.args[0], x, ir.Constant(I64, 0))
        factor, factor_shoup = (
            lanes.splat(builder.load(lanes.pointer(signature.args[index], array, at)))
            for index, array in ((3, twiddles), (4, shoup))
        )
        prime_lanes = lanes.splat(prime)
        double = builder.add(prime_lanes, prime_lanes)
        a, b = lanes.reduce_once(lanes.load(origin, first), double), lanes.load(origin, second)
        product = lanes.multiply_shoup(b, factor, factor_shoup, prime_lanes)
        lanes.store(builder.add(a, product), origin, first)
        lanes.store(builder.add(builder.sub(a, product), double), origin, second)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, twiddles, shoup, index, types.uint32), generate


def _inverse_pair(full: bool, vector_twiddles: bool) -> Callable[..., Any]:
    """Make the intrinsic ``f(x, first, second, kept, twiddles, twiddles_shoup, at, prime)``: one inverse
    butterfly.

    The difference of ``x[first:][:16]`` and ``x[second:][:16]`` times its twiddle goes to ``x[kept:]``; a
    full butterfly also puts the sum into ``x[first:]``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        x, first, second, kept, twiddles, shoup, at, prime = arguments
        origin = lanes.pointer(signature.args[0], x, ir.Constant(I64, 0))
        zero = ir.Constant(I64, 0)
        bases = lanes.pointer(signature.args[4], twiddles, at), lanes.pointer(signature.args[5], shoup, at)
        if vector_twiddles:
            factor, factor_shoup = (lanes.load(base, zero) for base in bases)
        else:
            factor, factor_shoup = (lanes.splat(builder.load(base)) for base in bases)
        prime_lanes = lanes.splat(prime)
        double = builder.add(prime_lanes, prime_lanes)
        a, b = lanes.load(origin, first), lanes.load(origin, second)
        difference = builder.add(builder.sub(a, b), double)
        if full:
            lanes.store(lanes.reduce_once(builder.add(a, b), double), origin, first)
        lanes.store(lanes.multiply_shoup(difference, factor, factor_shoup, prime_lanes), origin, kept)
        return context.get_dummy_value()

    def typer(
        typing_context: Any,
        x: Any,
        first: Any,
        second: Any,
        kept: Any,
        twiddles: Any,
        shoup: Any,
        at: Any,
        prime: Any,
    ) -> Any:
        index = types.intp
        return types.void(x, index, index, index, twiddles, shoup, index, types.uint32), generate

    return intrinsic(typer)


inverse_pair = _inverse_pair(full=True, vector_twiddles=False)
inverse_pair_lanes = _inverse_pair(full=True, vector_twiddles=True)
inverse_difference = _inverse_pair(full=False, vector_twiddles=False)
inverse_difference_lanes = _inverse_pair(full=False, vector_twiddles=True)


@intrinsic
def transpose_tile(
    typing_context: Any, source: Any, source_offset: Any, target: Any, target_offset: Any, stride: Any
) -> Any:
    """Transpose the 16x16 tile at ``source[source_offset]`` into ``target[target_offset]``; rows are
    ``stride`` apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        source, source_offset, target, target_offset, stride = arguments
        source_at = lanes.pointer(signature.args[0], source, source_offset)
        target_at = lanes.pointer(signature.args[2], target, target_offset)
        positions = [builder.mul(stride, ir.Constant(stride.type, row)) for row in range(LANES)]
        rows = lanes.transpose([lanes.load(source_at, position) for position in positions])
        for row, position in zip(rows, positions, strict=True):
            lanes.store(row, target_at, position)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), generate
