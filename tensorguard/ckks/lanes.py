"""Sixteen 32-bit lanes: what the vector intrinsics of the kernels are written in.

LLVM's loop vectoriser finds neither the 32-bit high multiplication nor the 16x16 transposition the
number-theoretic transform needs, so the few hot inner bodies are written as explicit ``<16 x i32>``
operations.  They are portable LLVM IR: the back end lowers them to AVX-512, AVX2, NEON or scalar code.  There
are no branches, table look-ups or divisions that depend on data.

Lanes hold residues of primes below 2**30.  Multiplication by a constant w uses Shoup's precomputed ``floor(w
* 2**32 / p)``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

LANES = 16
I32 = ir.IntType(32)
I64 = ir.IntType(64)
V32 = ir.VectorType(I32, LANES)
V64 = ir.VectorType(I64, LANES // 2)


def splat32(value: int) -> ir.Constant:
    return ir.Constant(V32, [ir.Constant(I32, value)] * LANES)


def splat64(value: int) -> ir.Constant:
    return ir.Constant(V64, [ir.Constant(I64, value)] * (LANES // 2))


LOW = splat64(0xFFFFFFFF)
HIGH = splat64(0xFFFFFFFF00000000)
SHIFT = splat64(32)


class Lanes:
    """Emits vector code for one intrinsic call."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context = context
        self.builder = builder

    def pointer(self, array_type: Any, array: Any, offset: Any) -> Any:
        """Address of ``array[offset]`` of a contiguous array."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        return self.builder.gep(data, [offset])

    def load(self, pointer: Any, offset: Any, element: Any = V32) -> Any:
        address = self.builder.bitcast(self.builder.gep(pointer, [offset]), element.as_pointer())
        return self.builder.load(address, align=4)

    def store(self, value: Any, pointer: Any, offset: Any) -> None:
        address = self.builder.bitcast(self.builder.gep(pointer, [offset]), value.type.as_pointer())
        self.builder.store(value, address, align=4)

    def prefetch(self, pointer: Any, offset: Any) -> None:
        """Ask for the cache line of ``pointer[offset]``, which need not exist, to be read later."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        address = self.builder.bitcast(self.builder.gep(pointer, [offset]), byte)
        read, keep, data = (ir.Constant(I32, flag) for flag in (0, 2, 1))
        self.builder.call(function, [address, read, keep, data])

    def splat(self, scalar: Any) -> Any:
        seed = self.builder.insert_element(ir.Constant(V32, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(seed, seed, splat32(0))

    def scalars(self, array_type: Any, array: Any, first: Any, count: int) -> list[Any]:
        """``array[first : first + count]``, each in all lanes."""
        base = self.pointer(array_type, array, first)
        return [self.splat(self.builder.load(self.builder.gep(base, [ir.Constant(I64, k)]))) for k in range(count)]

    def smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_unsigned("<", a, b), a, b)

    def reduce_once(self, value: Any, modulus: Any) -> Any:
        """value - modulus where value >= modulus, else value (the unsigned wrap makes it a minimum)."""
        return self.smaller(value, self.builder.sub(value, modulus))

    def transpose(self, rows: list[Any]) -> list[Any]:
        """Of sixteen vectors: four rounds of exchanging halves of row pairs (Eklundh's algorithm)."""
        rows = list(rows)
        for half in (8, 4, 2, 1):
            # Lane masks that keep, from two rows, the lanes with this index bit clear (low) or set (high).
            low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            masks = [ir.Constant(V32, [ir.Constant(I32, lane) for lane in mask]) for mask in (low, high)]
            for row in range(LANES):
                if not row & half:
                    a, b = rows[row], rows[row + half]
                    rows[row] = self.builder.shuffle_vector(a, b, masks[0])
                    rows[row + half] = self.builder.shuffle_vector(a, b, masks[1])
        return rows

    def even(self, value: Any) -> Any:
        return self.builder.and_(self.builder.bitcast(value, V64), LOW)

    def odd(self, value: Any) -> Any:
        return self.builder.lshr(self.builder.bitcast(value, V64), SHIFT)

    def multiply_high(self, a: Any, b: Any) -> Any:
        b_ = self.builder
        even = b_.lshr(b_.mul(self.even(a), self.even(b)), SHIFT)
        odd = b_.and_(b_.mul(self.odd(a), self.odd(b)), HIGH)
        return b_.bitcast(b_.or_(even, odd), V32)

    def multiply_shoup(self, value: Any, factor: Any, factor_shoup: Any, prime: Any) -> Any:
        """value * factor mod prime, in [0, 2 prime), for any 32-bit value."""
        b_ = self.builder
        quotient = self.multiply_high(value, factor_shoup)
        return b_.sub(b_.mul(value, factor), b_.mul(quotient, prime))
