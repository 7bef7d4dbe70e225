"""The ChaCha20 key stream (RFC 8439) of public seeds, sixteen blocks at a time. Secret streams use `cryptography`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from tensorguard.ckks.lanes import I32, I64, LANES, V32, Lanes, splat32


def _chacha20_rounds(lanes: Lanes, state: list[Any]) -> list[Any]:
    """The twenty rounds of RFC 8439 (section 2.3) on sixteen blocks, one in each lane, and the final addition."""
    b_ = lanes.builder

    def rotate(value: Any, bits: int) -> Any:
        return b_.or_(b_.shl(value, splat32(bits)), b_.lshr(value, splat32(32 - bits)))

    x = list(state)
    quarters = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    quarters += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for half in (quarters[:4], quarters[4:]) * 10:
        for first, bits in ((True, 16), (False, 12), (True, 8), (False, 7)):
            for a, b, c, d in half:
                if first:
                    x[a] = b_.add(x[a], x[b])
                    x[d] = rotate(b_.xor(x[d], x[a]), bits)
                else:
                    x[c] = b_.add(x[c], x[d])
                    x[b] = rotate(b_.xor(x[b], x[c]), bits)
    return [b_.add(after, before) for after, before in zip(x, state, strict=True)]


@intrinsic
def chacha20_words(typing_context: Any, key: Any, nonce: Any, block: Any, target: Any, at: Any) -> Any:
    """256 words of the ChaCha20 key stream, of blocks ``block`` to ``block + 15``, to ``target[at:]``.

    key uint32 [8], little-endian words; the 96-bit nonce is ``nonce`` and eight zero bytes. For public streams.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = Lanes(context, builder)
        key, nonce, block, target, at = arguments
        target_at = lanes.pointer(signature.args[3], target, at)
        state = [splat32(word) for word in (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)]
        state += lanes.scalars(signature.args[0], key, ir.Constant(I64, 0), 8)
        counts = ir.Constant(V32, [ir.Constant(I32, lane) for lane in range(LANES)])
        # RFC 8439: a 32-bit counter, then the nonce.
        state += [builder.add(lanes.splat(block), counts), lanes.splat(nonce), splat32(0), splat32(0)]
        rows = lanes.transpose(_chacha20_rounds(lanes, state))
        for row, value in enumerate(rows):
            lanes.store(value, target_at, ir.Constant(I64, LANES * row))
        return context.get_dummy_value()

    return types.void(key, types.uint32, types.uint32, target, types.intp), generate
