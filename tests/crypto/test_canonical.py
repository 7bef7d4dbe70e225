"""Canonical JSON: the RFC 8785 cases that apply, round trips, and everything that is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.crypto import canonical
from tensorguard.errors import InvalidInputError

scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
).filter(lambda value: _depth(value) <= canonical.MAX_DEPTH)


def _depth(value: object) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0) if isinstance(value, (dict, list)) else 0


@given(values)
def test_round_trip(value: object) -> None:
    assert canonical.loads(canonical.dumps(value)) == value


def test_sorts_by_utf16_code_units_like_rfc_8785() -> None:
    # The example of RFC 8785, section 3.2.3.
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    data = canonical.dumps(dict.fromkeys(keys, 0))
    assert list(canonical.loads(data)) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


def test_escapes_like_rfc_8785() -> None:
    # Section 3.2.2.2.
    assert canonical.dumps('\u20ac$\x0f\nA\'B"\\\\"/') == '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'.encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b"1.0",
        b"1e3",
        b"-0",
        b"NaN",
        b"Infinity",
        b"9007199254740992",
        b"1" * 5000,
        b'"\\u0041"',
        b'"\\ud800"',
        b'"\xff"',
        b"\xef\xbb\xbf1",
        b"[1",
        b"",
        b"[" * 100_000,
        b"[" * 17 + b"]" * 17,
    ],
)
def test_refuses(data: bytes) -> None:
    with pytest.raises(InvalidInputError):
        canonical.loads(data)


@pytest.mark.parametrize("value", [1.5, math.nan, b"x", {1: 2}, 2**53, "\ud800", object()])
def test_does_not_encode(value: object) -> None:
    with pytest.raises(InvalidInputError):
        canonical.dumps(value)


def test_size_is_limited_before_parsing() -> None:
    with pytest.raises(InvalidInputError, match="limit is 10"):
        canonical.loads(b'"' + b"x" * 10 + b'"', max_bytes=10)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_as_strings(value: float) -> None:
    assert canonical.decode_float(canonical.encode_float(value)) == value


@pytest.mark.parametrize("text", ["nan", "inf", "1", "1.50", " 1.5", "1_0.0", "0x1", "", "1" * 40, 1.5])
def test_refuses_other_spellings_of_floats(text: str) -> None:
    with pytest.raises(InvalidInputError):
        canonical.decode_float(text)


def test_names_duplicate_keys() -> None:
    with pytest.raises(InvalidInputError, match="same key twice"):
        canonical.loads(b'{"a":1,"a":1}')
