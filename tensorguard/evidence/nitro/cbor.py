"""Strict CBOR (RFC 8949): only what the messages of a Nitro security module are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import cbor2

from tensorguard.errors import EvidenceRefusedError

MAX_DEPTH = 4


def loads(data: bytes, max_bytes: int) -> Any:
    """Decode one data item in its shortest form.

    Raises EvidenceRefusedError (`malformed`) when `data` is longer than `max_bytes`, is nested deeper than
    `MAX_DEPTH`, has tags, a repeated key, an indefinite length or a number or length that is not in its shortest
    form, or when anything follows.
    """
    if len(data) > max_bytes:
        raise EvidenceRefusedError(f"the CBOR has {len(data)} bytes; the limit is {max_bytes}")
    try:
        value = cbor2.loads(
            data,
            semantic_decoders=_NO_TAGS,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
        )
        # The decoder minds neither what follows the first item nor that a number could be shorter. This alone would
        # refuse repeated keys and indefinite lengths, too; the decoder refuses them sooner.
        exact = cbor2.dumps(value) == data
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError):
        raise EvidenceRefusedError(
            "the evidence is not the CBOR of a Nitro document: damaged, too deep, tagged, with a repeated key or of "
            "indefinite length"
        ) from None
    if not exact:
        raise EvidenceRefusedError("the CBOR is not in its shortest form, or something follows it")
    return value


class _NoTags(dict[int, Callable[..., NoReturn]]):
    """Overrides the decoder's handling of every tag: they make dates, patterns, cycles and enormous numbers."""

    def __missing__(self, tag: int) -> Callable[..., NoReturn]:
        return _refuse


def _refuse(*_: object) -> NoReturn:
    raise ValueError("tags are not allowed")


_NO_TAGS = _NoTags()
