"""The structure of a quote: one way to write it, every length exact."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.tdx.quote import MAX_QUOTE_BYTES, parse_quote
from tests.support.synthetic_pki.tdx import Pki, Quote, pem

PKI = Pki()
QUOTES = {version: Quote(version=version).encode() for version in (4, 5)}
AUTHENTICATION = 48 + 584
"""Where version 4 has the length of its signature data."""


def reason(data: bytes) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        parse_quote(data)
    return refused.value.detail


@pytest.mark.parametrize("version", [4, 5])
def test_well_formed(version: int) -> None:
    quote = parse_quote(QUOTES[version] + bytes(10))
    assert (quote.version, quote.encoded, quote.padding) == (version, QUOTES[version], bytes(10))
    assert quote.chain == (PKI.pck, PKI.platform_ca, PKI.root)


def test_a_chain_may_end_with_one_zero_byte() -> None:
    assert parse_quote(Quote(chain=PKI.pck_chain + b"\0").encode()).chain[0] == PKI.pck
    assert reason(Quote(chain=PKI.pck_chain + b"\0\0").encode()) == "malformed"


@pytest.mark.parametrize("version", [4, 5])
def test_cut_anywhere(version: int) -> None:
    for size in range(0, len(QUOTES[version]), 7):
        assert reason(QUOTES[version][:size]) == "malformed"


@pytest.mark.parametrize(
    "chain",
    [
        b"",
        PKI.pck_chain[:-1],
        b"\n" + PKI.pck_chain,
        PKI.pck_chain.replace(b"\n", b"\r\n"),
        PKI.pck_chain + b"\n",
        PKI.pck_chain + pem(PKI.root),
        pem(PKI.pck, PKI.root),
        pem(PKI.pck),
        PKI.pck_chain.replace(b"BEGIN CERTIFICATE", b"BEGIN CERTIFICATe"),
    ],
)
def test_certificates_are_three_in_plain_pem(chain: bytes) -> None:
    assert reason(Quote(chain=chain).encode()) == "malformed"


def test_nothing_stands_behind_the_certificates() -> None:
    size = struct.unpack_from("<I", QUOTES[4], AUTHENTICATION)[0]
    inner = struct.unpack_from("<I", QUOTES[4], AUTHENTICATION + 4 + 130)[0]
    assert inner == size - 134
    longer = bytearray(QUOTES[4] + b"x" * 8)
    struct.pack_into("<I", longer, AUTHENTICATION, size + 8)
    assert reason(bytes(longer)) == "malformed"
    struct.pack_into("<I", longer, AUTHENTICATION + 4 + 130, inner + 8)
    assert reason(bytes(longer)) == "malformed"


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"\x03"), (0, b"\x06"), (4, b"\x82"), (48, b"\x02"), (48, b"\x04"), (50, b"\x48\x02"), (50, b"\0\0\0\x7f")],
)
def test_another_version_or_body(offset: int, value: bytes) -> None:
    data = bytearray(QUOTES[5])
    data[offset : offset + len(value)] = value
    assert reason(bytes(data)) == "malformed"


def test_an_enclaves_quote_is_named() -> None:
    assert reason(Quote(tee_type=0).encode()) == "not_tdx"


def test_size_is_bounded_before_anything_is_read() -> None:
    padded = QUOTES[4].ljust(MAX_QUOTE_BYTES, b"\0")
    assert len(parse_quote(padded).padding) == MAX_QUOTE_BYTES - len(QUOTES[4])
    assert reason(padded + b"\0") == "malformed"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=6000))
def test_bytes_are_a_quote_or_are_refused(data: bytes) -> None:
    for candidate in (data, QUOTES[4][:48] + data, QUOTES[5][:702] + data):
        assert reason(candidate) in ("malformed", "not_tdx")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(QUOTES[5]) - 1), st.binary(min_size=1, max_size=8))
def test_changed_quotes_are_parsed_or_refused(position: int, replacement: bytes) -> None:
    changed = QUOTES[5][:position] + replacement + QUOTES[5][position + len(replacement) :]
    try:
        parse_quote(changed)
    except EvidenceRefusedError as refused:
        assert refused.detail in ("malformed", "not_tdx")
