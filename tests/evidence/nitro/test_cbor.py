from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.nitro import cbor


def refused(data: bytes, limit: int = 1000) -> bool:
    with pytest.raises(EvidenceRefusedError) as error:
        cbor.loads(data, limit)
    return error.value.detail == "malformed"


@pytest.mark.parametrize("value", [0, -35, 2**64 - 1, b"x", "é", None, [1, [2, {3: b""}]], {"a": 1, 2: b"c"}], ids=str)
def test_values(value: Any) -> None:
    assert cbor.loads(cbor2.dumps(value), 1000) == value


def test_size() -> None:
    data = cbor2.dumps(b"x" * 100)
    assert cbor.loads(data, len(data)) == b"x" * 100
    assert refused(data, len(data) - 1)


@pytest.mark.parametrize(
    "tag",
    [
        cbor2.CBORTag(0, "2026-05-28T20:26:40Z"),
        cbor2.CBORTag(2, b"\1" * 9),
        cbor2.CBORTag(4, [2, 5]),
        cbor2.CBORTag(30, [1, 3]),
        cbor2.CBORTag(35, "(a+)+$"),
        cbor2.CBORTag(37, b"u" * 16),
        cbor2.CBORTag(258, [1, 2]),
        cbor2.CBORTag(999, b"n"),
    ],
    ids=lambda tag: str(tag.tag),
)
def test_no_tag_reaches_a_decoder(tag: cbor2.CBORTag) -> None:
    assert refused(cbor2.dumps(tag))
    assert refused(cbor2.dumps([tag]))
    assert refused(cbor2.dumps({"a": tag}))


def test_cycles_and_references() -> None:
    assert refused(bytes.fromhex("d81c81d81d00"))
    assert refused(bytes.fromhex("d9010082626161d81900"))


def test_depth() -> None:
    assert cbor.loads(b"\x81" * cbor.MAX_DEPTH + b"\x00", 1000) == [[[[0]]]]
    assert refused(b"\x81" * (cbor.MAX_DEPTH + 1) + b"\x00")


@pytest.mark.parametrize(
    "text", ["", "1800", "190018", "5801aa", "9f00ff", "5f4101ff", "a201000100", "0000", "81", "1c", "62c328", "ff"]
)
def test_other_encodings(text: str) -> None:
    assert refused(bytes.fromhex(text))


@given(st.binary(max_size=40))
def test_what_is_taken_is_the_only_encoding(data: bytes) -> None:
    try:
        value = cbor.loads(data, 40)
    except EvidenceRefusedError:
        return
    assert cbor2.dumps(value) == data
