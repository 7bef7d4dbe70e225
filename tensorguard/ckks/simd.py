"""Sixteen-lane building blocks of the kernels, as numba intrinsics that emit LLVM vector instructions.

LLVM's loop vectoriser finds neither the 32-bit high multiplication nor the 16x16 transposition the
number-theoretic transform needs, so the few hot inner bodies are written here as explicit ``<16 x i32>``
operations.  They are portable LLVM IR: the back end lowers them to AVX-512, AVX2, NEON or scalar code.  There
are no branches, table look-ups or divisions that depend on data.

Lanes hold residues of primes below 2**30.  Multiplication by a constant w uses Shoup's precomputed ``floor(w
* 2**32 / p)``; butterflies are Harvey's lazy ones (D. Harvey, "Faster arithmetic for number-theoretic
transforms", 2014): forward values stay below 4p, inverse values below 2p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
SEGMENT = 64
"""Coefficients that the multiply-accumulate handles at once."""

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_V32 = ir.VectorType(_I32, LANES)
_V64 = ir.VectorType(_I64, LANES // 2)


def _splat32(value: int) -> ir.Constant:
    return ir.Constant(_V32, [ir.Constant(_I32, value)] * LANES)


def _splat64(value: int) -> ir.Constant:
    return ir.Constant(_V64, [ir.Constant(_I64, value)] * (LANES // 2))


_LOW = _splat64(0xFFFFFFFF)
_HIGH = _splat64(0xFFFFFFFF00000000)
_SHIFT = _splat64(32)


class _Lanes:
    """Emits vector code for one intrinsic call."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context = context
        self.builder = builder

    def pointer(self, array_type: Any, array: Any, offset: Any) -> Any:
        """Address of ``array[offset]`` of a contiguous array."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        return self.builder.gep(data, [offset])

    def load(self, pointer: Any, offset: Any, element: Any = _V32) -> Any:
        address = self.builder.bitcast(self.builder.gep(pointer, [offset]), element.as_pointer())
        return self.builder.load(address, align=4)

    def store(self, value: Any, pointer: Any, offset: Any) -> None:
        address = self.builder.bitcast(self.builder.gep(pointer, [offset]), value.type.as_pointer())
        self.builder.store(value, address, align=4)

    def splat(self, scalar: Any) -> Any:
        seed = self.builder.insert_element(ir.Constant(_V32, ir.Undefined), scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(seed, seed, _splat32(0))

    def smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_unsigned("<", a, b), a, b)

    def reduce_once(self, value: Any, modulus: Any) -> Any:
        """value - modulus where value >= modulus, else value (the unsigned wrap makes it a minimum)."""
        return self.smaller(value, self.builder.sub(value, modulus))

    def even(self, value: Any) -> Any:
        return self.builder.and_(self.builder.bitcast(value, _V64), _LOW)

    def odd(self, value: Any) -> Any:
        return self.builder.lshr(self.builder.bitcast(value, _V64), _SHIFT)

    def multiply_high(self, a: Any, b: Any) -> Any:
        b_ = self.builder
        even = b_.lshr(b_.mul(self.even(a), self.even(b)), _SHIFT)
        odd = b_.and_(b_.mul(self.odd(a), self.odd(b)), _HIGH)
        return b_.bitcast(b_.or_(even, odd), _V32)

    def multiply_shoup(self, value: Any, factor: Any, factor_shoup: Any, prime: Any) -> Any:
        """value * factor mod prime, in [0, 2 prime), for any 32-bit value."""
        b_ = self.builder
        quotient = self.multiply_high(value, factor_shoup)
        return b_.sub(b_.mul(value, factor), b_.mul(quotient, prime))


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
        lanes = _Lanes(context, builder)
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
                return lanes.load(base, ir.Constant(_I64, 64 * index))
            return lanes.splat(builder.load(builder.gep(base, [ir.Constant(_I64, index)])))

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
            zero = ir.Constant(_I64, 0)
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
        lanes = _Lanes(context, builder)
        x, first, second, twiddles, shoup, at, prime = arguments
        origin = lanes.pointer(signature.args[0], x, ir.Constant(_I64, 0))
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
        lanes = _Lanes(context, builder)
        x, first, second, kept, twiddles, shoup, at, prime = arguments
        origin = lanes.pointer(signature.args[0], x, ir.Constant(_I64, 0))
        zero = ir.Constant(_I64, 0)
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

    Four rounds of exchanging halves of row pairs (Eklundh's algorithm).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _Lanes(context, builder)
        source, source_offset, target, target_offset, stride = arguments
        source_at = lanes.pointer(signature.args[0], source, source_offset)
        target_at = lanes.pointer(signature.args[2], target, target_offset)
        positions = [builder.mul(stride, ir.Constant(stride.type, row)) for row in range(LANES)]
        rows = [lanes.load(source_at, position) for position in positions]
        for half in (8, 4, 2, 1):
            # Lane masks that keep, from two rows, the lanes with this index bit clear (low) or set (high).
            low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            masks = [ir.Constant(_V32, [ir.Constant(_I32, lane) for lane in mask]) for mask in (low, high)]
            for row in range(LANES):
                if not row & half:
                    a, b = rows[row], rows[row + half]
                    rows[row] = builder.shuffle_vector(a, b, masks[0])
                    rows[row + half] = builder.shuffle_vector(a, b, masks[1])
        for row, position in zip(rows, positions, strict=True):
            lanes.store(row, target_at, position)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), generate


@intrinsic
def multiply_accumulate(
    typing_context: Any,
    sums: Any,
    sums_offset: Any,
    sums_stride: Any,
    weights: Any,
    weights_offset: Any,
    b: Any,
    a: Any,
    offset: Any,
    stride: Any,
    count: Any,
    constants: Any,
    first: Any,
) -> Any:
    """Add Σ_k weights_k · b_k (and · a_k), k < count <= 16, to SEGMENT lanes of two running sums below 2p.

    ``weights_k = weights[weights_offset + SEGMENT k :]`` and ``b_k = b[offset + stride k :]`` (``a_k``
    likewise), all below p. The sums are at ``sums[sums_offset :]`` for b and ``sums_stride`` further for a.
    ``constants[first:]`` holds p, 2**32 mod p, floor(2**32 (2**32 mod p) / p) and floor(2**32 / p).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _Lanes(context, builder)
        (
            sums,
            sums_offset,
            sums_stride,
            weights,
            weights_offset,
            b,
            a,
            offset,
            stride,
            count,
            constants,
            first,
        ) = arguments
        kinds = signature.args
        sums_at = lanes.pointer(kinds[0], sums, sums_offset)
        weights_at = lanes.pointer(kinds[3], weights, weights_offset)
        inputs_at = [lanes.pointer(kinds[5], b, offset), lanes.pointer(kinds[6], a, offset)]
        constants_at = lanes.pointer(kinds[10], constants, first)
        vectors = range(SEGMENT // LANES)
        # A 64-bit accumulator for each vector, input and lane parity; LLVM keeps them in registers.
        halves = [(vector, which, half) for vector in vectors for which in range(2) for half in range(2)]
        accumulators = {key: cgutils.alloca_once_value(builder, _splat64(0)) for key in halves}
        with cgutils.for_range(builder, count) as loop:
            weight_at = builder.mul(loop.index, ir.Constant(_I64, SEGMENT))
            input_at = builder.mul(loop.index, stride)
            for vector in vectors:
                step = ir.Constant(_I64, LANES * vector)
                weight = lanes.load(weights_at, builder.add(weight_at, step))
                for which, base in enumerate(inputs_at):
                    value = lanes.load(base, builder.add(input_at, step))
                    for half, part in enumerate((lanes.even, lanes.odd)):
                        slot = accumulators[vector, which, half]
                        product = builder.mul(part(value), part(weight))
                        builder.store(builder.add(builder.load(slot), product), slot)

        prime, word, word_shoup, unit_shoup = (
            lanes.splat(builder.load(builder.gep(constants_at, [ir.Constant(_I64, index)]))) for index in range(4)
        )

        def reduce(total: Any) -> Any:
            """A 64-bit total to [0, 4p): high word times 2**32 mod p, plus low word, both by Shoup."""
            high, low = builder.lshr(total, _SHIFT), builder.and_(total, _LOW)
            high_quotient = builder.lshr(builder.mul(high, lanes.even(word_shoup)), _SHIFT)
            low_quotient = builder.lshr(builder.mul(low, lanes.even(unit_shoup)), _SHIFT)
            quotient = builder.mul(builder.add(high_quotient, low_quotient), lanes.even(prime))
            return builder.sub(builder.add(builder.mul(high, lanes.even(word)), low), quotient)

        double = builder.add(prime, prime)
        for vector in vectors:
            for which in range(2):
                even, odd = (reduce(builder.load(accumulators[vector, which, half])) for half in range(2))
                total = builder.bitcast(builder.or_(even, builder.shl(odd, _SHIFT)), _V32)
                position = builder.add(
                    builder.mul(sums_stride, ir.Constant(_I64, which)), ir.Constant(_I64, LANES * vector)
                )
                total = builder.add(lanes.load(sums_at, position), lanes.reduce_once(total, double))
                lanes.store(lanes.reduce_once(total, double), sums_at, position)
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(sums, index, index, weights, index, b, a, index, index, index, constants, index)
    return signature, generate


@intrinsic
def count_ones(typing_context: Any, word: Any) -> Any:
    """Number of set bits of a uint64, without branches or tables."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate
