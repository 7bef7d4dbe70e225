from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.product import Product
from tensorguard.evidence.snp.report import REPORT_BYTES, VERSIONS, parse_report
from tests.support.synthetic_pki import snp

ALWAYS_ONE = 1 << 17


def refusal(data: bytes) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        parse_report(data)
    return refused.value.detail


def test_every_field_is_where_the_specification_has_it() -> None:
    chip = snp.chip(Product.TURIN)
    parsed = parse_report(
        chip.report(
            guest_svn=0x01020304,
            policy=0x1F | 1 << 8 | ALWAYS_ONE | 1 << 16 | 1 << 20,
            family_id=b"f" * 16,
            image_id=b"g" * 16,
            vmpl=3,
            current_tcb=b"current.",
            platform=0b10100101,
            key_bits=1,
            report_data=b"d" * 64,
            measurement=b"M" * 48,
            host_data=b"h" * 32,
            id_key_digest=b"k" * 48,
            author_key_digest=b"a" * 48,
            reported_tcb=b"reported",
            chip_id=b"c" * 64,
            committed_tcb=b"commits.",
            launch_tcb=b"launched",
            mitigations=(5, 7),
        )
    )
    assert (parsed.version, parsed.guest_svn, parsed.vmpl) == (5, 0x01020304, 3)
    assert (parsed.guest_policy.abi_major, parsed.guest_policy.abi_minor) == (1, 31)
    assert parsed.guest_policy.smt and parsed.guest_policy.single_socket
    assert not parsed.guest_policy.debug and not parsed.guest_policy.migration_agent
    assert (parsed.family_id, parsed.image_id) == (b"f" * 16, b"g" * 16)
    assert (parsed.report_data, parsed.measurement, parsed.host_data) == (b"d" * 64, b"M" * 48, b"h" * 32)
    assert (parsed.id_key_digest, parsed.author_key_digest) == (b"k" * 48, b"a" * 48)
    assert (parsed.report_id, parsed.report_id_ma) == (b"i" * 32, b"\xff" * 32)
    assert (parsed.reported_tcb, parsed.current_tcb) == (b"reported", b"current.")
    assert (parsed.committed_tcb, parsed.launch_tcb) == (b"commits.", b"launched")
    assert parsed.platform.smt and parsed.platform.ecc and parsed.platform.alias_check and parsed.platform.tio
    assert not parsed.platform.tsme and not parsed.platform.rapl_disabled and not parsed.platform.ciphertext_hiding
    assert (parsed.cpuid, parsed.product, parsed.chip_id) == ((0x1A, 2), Product.TURIN, b"c" * 64)
    assert (parsed.current_firmware, parsed.committed_firmware) == ("1.55.29", "1.55.28")
    assert (parsed.launch_mitigations, parsed.current_mitigations) == (5, 7)
    assert parsed.signing_key is SigningKey.VCEK
    assert len(parsed.signed) == 0x2A0


@pytest.mark.parametrize(
    ("bit", "field"),
    [
        (16, "smt"),
        (18, "migration_agent"),
        (19, "debug"),
        (20, "single_socket"),
        (21, "cxl"),
        (22, "memory_aes_256_xts"),
        (23, "rapl_disabled"),
        (24, "ciphertext_hiding"),
        (25, "page_swap_disabled"),
    ],
)
def test_bits_of_the_guest_policy(bit: int, field: str) -> None:
    assert getattr(parse_report(snp.report(policy=ALWAYS_ONE | 1 << bit)).guest_policy, field)
    assert not getattr(parse_report(snp.report(policy=ALWAYS_ONE)).guest_policy, field)


@pytest.mark.parametrize("bit", range(26, 64))
def test_unknown_bits_of_the_guest_policy_are_refused(bit: int) -> None:
    assert refusal(snp.report(policy=ALWAYS_ONE | 1 << bit)) == "guest_policy_unknown"


def test_the_bit_that_is_always_one() -> None:
    assert refusal(snp.report(policy=0x10000)) == "malformed"


@pytest.mark.parametrize("size", [0, 1, REPORT_BYTES - 1, REPORT_BYTES + 1, 4096])
def test_other_sizes_are_refused(size: int) -> None:
    assert refusal(snp.report().ljust(size, b"\0")[:size]) == "malformed"


@pytest.mark.parametrize("version", [0, 1, 4, 6, 2**32 - 1])
def test_other_versions_are_refused(version: int) -> None:
    assert refusal(snp.report(version=version)) == "report_version_not_supported"


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_version_reserves_must_be_zero(version: int) -> None:
    """Every byte of the table that the specification reserves, for each version."""
    reserved = {*range(0x4C, 0x50), *range(0x18B, 0x1A0), 0x1EB, 0x1EF, *range(0x208, 0x2A0), *range(0x330, 0x4A0)}
    if version < 5:
        reserved |= set(range(0x1F8, 0x208))
    if version < 3:
        reserved |= set(range(0x188, 0x18B))
    good = bytearray(snp.report(version=version, cpuid=(0, 0, 0)))
    parse_report(bytes(good))
    for offset in reserved:
        good[offset] = 1
        assert refusal(bytes(good)) == "malformed", hex(offset)
        good[offset] = 0


def test_only_version_2_does_not_say_which_processor() -> None:
    assert parse_report(snp.report(version=2, cpuid=(0, 0, 0))).product is None
    assert parse_report(snp.report(version=3)).product is Product.MILAN
    assert parse_report(snp.report(version=3, cpuid=(0x19, 0x50, 0))).product is None


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, Product.MILAN),
        (0x19, 0x0F, Product.MILAN),
        (0x19, 0x10, Product.GENOA),
        (0x19, 0x1F, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x19, 0xAF, Product.GENOA),
        (0x19, 0x20, None),
        (0x19, 0xB0, None),
        (0x1A, 0x02, Product.TURIN),
        (0x1A, 0x11, Product.TURIN),
        (0x1A, 0x20, None),
        (0x18, 0x01, None),
        (0, 0, None),
    ],
)
def test_processor_lines(family: int, model: int, product: Product | None) -> None:
    assert Product.from_cpuid(family, model) is product


@pytest.mark.parametrize(
    ("key_bits", "reason"),
    [
        (0b00010, "chip_key_masked"),
        (0b00110, "chip_key_masked"),
        (7 << 2, "report_not_signed"),
        *[(selector << 2, "malformed") for selector in (2, 3, 4, 5, 6)],
        (1 << 5, "malformed"),
        (1 << 31, "malformed"),
    ],
)
def test_key_information_that_is_refused(key_bits: int, reason: str) -> None:
    assert refusal(snp.report(key_bits=key_bits)) == reason


def test_signing_key_selector() -> None:
    assert parse_report(snp.report(key_bits=0)).signing_key is SigningKey.VCEK
    assert parse_report(snp.report(key_bits=1 << 2)).signing_key is SigningKey.VLEK


def test_an_author_key_digest_needs_an_author_key() -> None:
    assert refusal(snp.report(author_key_digest=b"a" * 48)) == "malformed"
    assert parse_report(snp.report(author_key_digest=b"a" * 48, key_bits=1)).author_key_digest == b"a" * 48


def test_other_signature_algorithms_are_refused() -> None:
    assert refusal(snp.report(algorithm=0)) == "malformed"
    assert refusal(snp.report(algorithm=2)) == "malformed"


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_refused_with_a_reason(data: bytes) -> None:
    assert refusal(data) in {"malformed", "report_version_not_supported"}


@given(
    st.sampled_from(VERSIONS),
    st.binary(min_size=REPORT_BYTES - 4, max_size=REPORT_BYTES - 4),
    st.booleans(),
)
def test_arbitrary_fields_parse_or_are_refused(version: int, rest: bytes, cleared: bool) -> None:
    """Nothing but EvidenceRefusedError is raised, and what parses kept every byte that is signed."""
    data = bytearray(version.to_bytes(4, "little") + rest)
    if cleared:  # so that most of them get past the reserved bytes
        for start, end in (
            (0x4C, 0x50),
            (0x188, 0x1A0),
            (0x1EB, 0x1EC),
            (0x1EF, 0x1F0),
            (0x1F8, 0x2A0),
            (0x330, 0x4A0),
        ):
            data[start:end] = bytes(end - start)
        data[0x34:0x38] = b"\1\0\0\0"
        data[0x48:0x4C] = bytes([data[0x48] & 0b101, 0, 0, 0])
        data[0x08:0x10] = bytes([data[8], data[9], data[10] | 2, data[11] & 3, 0, 0, 0, 0])
        data[0x110:0x140] = bytes(48)
    try:
        parsed = parse_report(bytes(data))
    except EvidenceRefusedError:
        assert not cleared
        return
    assert parsed.version == version
    assert parsed.signed == bytes(data[:0x2A0])
    assert parsed.report_data == bytes(data[0x50:0x90])
