"""Canonical JSON: one byte string for one value, so that anyone can rebuild what was hashed and signed.

The rules are those of RFC 8785 (JCS) on a smaller set of values: objects with keys sorted by UTF-16 code
units, no white space, UTF-8, minimal escapes. Numbers are integers of magnitude below 2^53 only. Floats are
refused; a format that needs one stores it as a string (`encode_float`).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from tensorguard.errors import InvalidInputError

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 16
MAX_INTEGER = 2**53 - 1


def dumps(value: Any) -> bytes:
    """The canonical UTF-8 encoding of `value`: dict, list, tuple, str, int, bool and None.

    Raises InvalidInputError for anything else (floats included), depth above 16, or more than 4 MiB.
    """
    _check(value, 0)
    text = json.dumps(_sorted(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInputError("a string holds a lone surrogate, which UTF-8 cannot encode") from None
    if len(data) > MAX_BYTES:
        raise InvalidInputError(f"the JSON document has {len(data)} bytes; the limit is {MAX_BYTES}")
    return data


def loads(data: bytes, max_bytes: int = MAX_BYTES) -> Any:
    """Parse canonical JSON.

    Raises InvalidInputError when `data` is too large or too deep, has duplicate keys, floats or NaN, or is
    not exactly what `dumps` writes for the value it holds.
    """
    if len(data) > max_bytes:
        raise InvalidInputError(f"the JSON document has {len(data)} bytes; the limit is {max_bytes}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            parse_int=_integer,
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"not a JSON document: {error}") from None
    except RecursionError:
        raise InvalidInputError(f"the JSON document is nested deeper than {MAX_DEPTH} levels") from None
    if dumps(value) != data:
        raise InvalidInputError("the JSON document is not in canonical form (sorted keys, no white space)")
    return value


def encode_float(value: float) -> str:
    """A finite float64 as the shortest decimal string that reads back the same (Python's `repr`)."""
    if not math.isfinite(value):
        raise InvalidInputError(f"{value} cannot be encoded: only finite numbers can")
    return repr(float(value))


def decode_float(text: str) -> float:
    """The inverse of `encode_float`. Raises InvalidInputError for what it does not write."""
    try:
        value = float(text) if isinstance(text, str) and len(text) <= 32 else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or repr(value) != text:
        raise InvalidInputError(f"{text!r:.40} is not a canonical decimal number")
    return value


def _check(value: Any, depth: int) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise InvalidInputError("an integer beyond 2^53 - 1 has no exact JSON form")
    elif isinstance(value, (dict, list, tuple)) and depth == MAX_DEPTH:
        raise InvalidInputError(f"the JSON document is nested deeper than {MAX_DEPTH} levels")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInputError("a JSON object key is not a string")
            _check(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, depth + 1)
    else:
        raise InvalidInputError(f"canonical JSON has no form for {type(value).__name__} values")


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return {key: _sorted(value[key]) for key in keys}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidInputError("a JSON object has the same key twice")
    return result


def _integer(text: str) -> int:
    if len(text) > 17:
        raise InvalidInputError("an integer beyond 2^53 - 1 has no exact JSON form")
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise InvalidInputError(f"the number {text:.40} is not an integer; canonical JSON holds integers only")
