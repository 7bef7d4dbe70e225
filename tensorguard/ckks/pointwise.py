"""Operations on the residues at one place of several arrays, sixteen at a time, as numba intrinsics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tensorguard.ckks.lanes import I32, I64, V32, Lanes, splat32


def _pointwise(body: Callable[..., Any]) -> Callable[..., Any]:
    """Make the intrinsic ``f(target, inputs, at, scalars)``: sixteen lanes of ``target[at:]`` become ``body(lanes,
    target, *inputs, *scalars)``. Inputs are a tuple of arrays read at the same offset, scalars a tuple of uint32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        target, inputs, at, scalars = arguments
        target_at = lanes.pointer(signature.args[0], target, at)
        zero = ir.Constant(I64, 0)
        values = [
            lanes.load(lanes.pointer(kind, array, at), zero)
            for kind, array in zip(signature.args[1], cgutils.unpack_tuple(builder, inputs), strict=True)
        ]
        constants = [lanes.splat(scalar) for scalar in cgutils.unpack_tuple(builder, scalars)]
        lanes.store(body(lanes, lanes.load(target_at, zero), *values, *constants), target_at, zero)
        return context.get_dummy_value()

    def typer(typing_context: Any, target: Any, inputs: Any, at: Any, scalars: Any) -> Any:
        numbers = types.UniTuple(types.uint32, len(scalars))
        return types.void(target, inputs, types.intp, numbers), generate

    return intrinsic(typer)


def _add_product(lanes: Lanes, total: Any, value: Any, factor: Any, factor_shoup: Any, prime: Any) -> Any:
    double = lanes.builder.add(prime, prime)
    product = lanes.multiply_shoup(value, factor, factor_shoup, prime)
    return lanes.reduce_once(lanes.builder.add(total, product), double)


def _product(lanes: Lanes, value: Any, factor: Any, factor_shoup: Any, prime: Any) -> Any:
    return lanes.multiply_shoup(value, factor, factor_shoup, prime)


def _reduced_sum(lanes: Lanes, value: Any, mask: Any, key: Any, key_shoup: Any, prime: Any) -> Any:
    double = lanes.builder.add(prime, prime)
    total = _add_product(lanes, lanes.reduce_once(value, double), mask, key, key_shoup, prime)
    return lanes.reduce_once(total, prime)


def _add_reduced(lanes: Lanes, total: Any, value: Any, prime: Any) -> Any:
    double = lanes.builder.add(prime, prime)
    total = lanes.builder.add(total, lanes.reduce_once(value, double))
    return lanes.reduce_once(lanes.reduce_once(total, double), prime)


def _plaintext(lanes: Lanes, _: Any, message: Any, error: Any, factor: Any, factor_shoup: Any, prime: Any) -> Any:
    b_ = lanes.builder
    scaled = lanes.multiply_shoup(b_.add(message, b_.add(prime, prime)), factor, factor_shoup, prime)
    return b_.add(scaled, b_.add(error, prime))


def _with_error(lanes: Lanes, value: Any, error: Any, prime: Any) -> Any:
    double = lanes.builder.add(prime, prime)
    total = lanes.builder.add(lanes.builder.add(value, prime), error)
    return lanes.reduce_once(lanes.reduce_once(total, double), prime)


def _drop(lanes: Lanes, value: Any, dropped: Any, prime: Any, other: Any, factor: Any, factor_shoup: Any) -> Any:
    b_ = lanes.builder
    above_half = b_.sext(b_.icmp_unsigned(">", dropped, b_.lshr(other, splat32(1))), V32)
    remainder = b_.sub(dropped, b_.and_(other, above_half))
    difference = b_.sub(b_.add(value, prime), remainder)
    return lanes.reduce_once(lanes.multiply_shoup(difference, factor, factor_shoup, prime), prime)


product = _pointwise(_product)
"""target * factor, below 2p; inputs (factors, Shoup quotients), scalars (p,)."""
add_product = _pointwise(_add_product)
"""target += value * factor, below 2p; inputs (value, factors, Shoup quotients), scalars (p,)."""
reduced_sum = _pointwise(_reduced_sum)
"""target, below 4p, + mask * key, fully reduced; inputs (mask, keys, Shoup quotients), scalars (p,)."""
add_reduced = _pointwise(_add_reduced)
"""target, below p, + a value below 4p, fully reduced; inputs (value,), scalars (p,)."""
plaintext = _pointwise(_plaintext)
"""Δ m + e below 4p, of signed |m| <= 2p and small signed e; inputs (m, e), scalars (Δ, its Shoup quotient, p)."""
with_error = _pointwise(_with_error)
"""target, below 2p, + a signed error of at most p, fully reduced; inputs (errors,), scalars (p,)."""
drop = _pointwise(_drop)
"""(target - centred(dropped)) / p_k mod p, both fully reduced; inputs (dropped,), scalars (p, p_k, 1/p_k mod p, its
Shoup quotient)."""


@intrinsic
def take_from(typing_context: Any, target: Any, at: Any, address: Any, source: Any, prime: Any) -> Any:
    """``target[at:][:16]`` += sixteen uint32 at ``source`` of the array at this address; all below 2p. Leaves zeros.

    The caller keeps the array: kernels take no lists of arrays, and copying them into one costs more than adding.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        target, at, address, source, prime = arguments
        target_at = lanes.pointer(signature.args[0], target, at)
        source_at = builder.inttoptr(address, I32.as_pointer())
        zero = ir.Constant(I64, 0)
        prime_lanes = lanes.splat(prime)
        total = builder.add(lanes.load(target_at, zero), lanes.load(source_at, source))
        lanes.store(splat32(0), source_at, source)
        lanes.store(lanes.reduce_once(total, builder.add(prime_lanes, prime_lanes)), target_at, zero)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.uint64, types.intp, types.uint32), generate


@intrinsic
def move(typing_context: Any, values: Any, source: Any, target: Any) -> Any:
    """``values[target:][:16] = values[source:][:16]``; the two may overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        values, source, target = arguments
        origin = lanes.pointer(signature.args[0], values, ir.Constant(I64, 0))
        lanes.store(lanes.load(origin, source), origin, target)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp), generate


@intrinsic
def count_ones(typing_context: Any, word: Any) -> Any:
    """Number of set bits of a uint64, without branches or tables."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate
