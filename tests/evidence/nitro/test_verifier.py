"""The verifier against a security module and attackers of our own. The real documents are in test_vectors.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.nitro.cose import MAX_BYTES, MAX_PAYLOAD_BYTES
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tests.support.synthetic_pki.certificates import AT, NOW, Issued, issue
from tests.support.synthetic_pki.nitro import ES384, PCRS, Module, sign1

MODULE = Module.create()
GOOD = MODULE.evidence()


def verify(evidence: bytes, module: Module = MODULE, *, at: float = NOW) -> Claims:
    return NitroVerifier([module.root]).verify(evidence, at=at)


def reason(evidence: bytes, module: Module = MODULE, *, at: float = NOW) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        verify(evidence, module, at=at)
    return refused.value.detail


def test_claims() -> None:
    claims = verify(GOOD)
    assert claims.kind is EvidenceKind.NITRO
    assert claims.measurements == {f"pcr{index}": value.hex() for index, value in PCRS.items()}
    assert (claims.report_data, claims.nonce) == (bytes(range(64)), b"n" * 32)
    assert (claims.issued_at, claims.debug, claims.role) == (int(NOW), False, None)
    assert claims.details == NitroClaims(
        module_id="i-0123456789abcdef0-enc0123456789abcdef",
        timestamp=int(NOW * 1000),
        certificate_expires_at=int(NOW + 8640),
        public_key=b"key",
        user_data=bytes(range(64)),
    )
    assert claims.details.instance_id == "i-0123456789abcdef0"


def test_a_tag_is_optional_and_nothing_in_the_unprotected_header_matters() -> None:
    payload, key = cbor2.dumps(MODULE.document()), MODULE.chain[-1].key
    assert verify(sign1(payload, key, tagged=True)) == verify(GOOD)
    assert verify(sign1(payload, key, unprotected={1: -7, 2: [1], 4: b"kid"})) == verify(GOOD)


@pytest.mark.parametrize("absent", [None, ...])
def test_optional_fields_may_be_null_or_absent(absent: object) -> None:
    claims = verify(MODULE.evidence(public_key=absent, user_data=absent, nonce=absent))
    assert (claims.report_data, claims.nonce) == (b"", b"")
    assert isinstance(claims.details, NitroClaims)
    assert (claims.details.public_key, claims.details.user_data) == (None, None)


def test_no_byte_can_be_changed() -> None:
    """Every byte, one bit of it; none is irrelevant: the message has no tag and its unprotected header is empty."""
    for position in range(len(GOOD)):
        mutated = bytearray(GOOD)
        mutated[position] ^= 1 << position % 8
        with pytest.raises(EvidenceRefusedError) as refused:
            verify(bytes(mutated))
        assert refused.value.detail in ("signature", "malformed", "algorithm")


@pytest.mark.parametrize("registers", [(0,), (1,), (2,), (0, 1, 2)])
def test_zero_code_registers_are_debug_mode(registers: tuple[int, ...]) -> None:
    assert verify(MODULE.evidence(pcrs={**PCRS, **dict.fromkeys(registers, bytes(48))})).debug


# Who signed


def test_another_root() -> None:
    assert reason(Module.create().evidence()) == "root_not_trusted"
    with pytest.raises(EvidenceRefusedError) as refused:
        NitroVerifier().verify(GOOD, at=NOW)
    assert refused.value.detail == "root_not_trusted"


def test_the_right_root_put_before_a_foreign_chain() -> None:
    forged = Module.create()
    forged.chain[0] = MODULE.chain[0]
    assert reason(forged.evidence()) == "chain"


def test_another_key_and_another_payload() -> None:
    assert reason(sign1(cbor2.dumps(MODULE.document()), Module.create().chain[-1].key)) == "signature"
    parts = cbor2.loads(GOOD)
    parts[2] = cbor2.dumps(MODULE.document(nonce=b"m" * 32))
    assert reason(cbor2.dumps(parts)) == "signature"


@pytest.mark.parametrize("signature", [b"", bytes(96), bytes(95), bytes(97), b"\xff" * 96, b"text"])
def test_signatures_that_are_none(signature: bytes) -> None:
    parts = cbor2.loads(GOOD)
    parts[3] = signature
    assert reason(cbor2.dumps(parts)) == "signature"


@pytest.mark.parametrize(
    "header",
    [{}, {1: -7}, {1: -36}, {1: -37}, {1: 5}, {1: "ES384"}, {1: None}, {2: [1], 1: -35}, {1: -35, 4: b"kid"}],
    ids=str,
)
def test_any_other_protected_header(header: dict[int, Any]) -> None:
    payload, key = cbor2.dumps(MODULE.document()), MODULE.chain[-1].key
    for unprotected in ({}, ES384):
        protected = cbor2.dumps(header)
        assert reason(sign1(payload, key, protected=protected, unprotected=unprotected)) == "algorithm"
        # Signed as ES384 and named otherwise, or the other way round.
        assert reason(sign1(payload, key, protected=protected, signed_header=cbor2.dumps(ES384))) == "algorithm"
        assert reason(sign1(payload, key, signed_header=protected)) == "signature"
    assert reason(sign1(payload, key, protected=b"", unprotected=ES384)) == "algorithm"


def test_another_hash_or_curve() -> None:
    payload, key = cbor2.dumps(MODULE.document()), MODULE.chain[-1].key
    assert reason(sign1(payload, key, digest=hashes.SHA256())) == "signature"
    small = Module.create(leaf={"curve": ec.SECP256R1()})
    assert reason(small.evidence(), small) == "signature"  # 64 bytes
    parts = cbor2.loads(small.evidence())
    parts[3] = bytes(96)
    assert reason(cbor2.dumps(parts), small) == "algorithm"


# The chain


@pytest.mark.parametrize(
    ("position", "days", "code"),
    [
        (0, (-20, -10), "certificate_expired"),
        (1, (-20, -10), "certificate_expired"),
        (2, (-20, -10), "certificate_expired"),
        (0, (10, 20), "certificate_not_yet_valid"),
        (1, (10, 20), "certificate_not_yet_valid"),
        (2, (10, 20), "certificate_not_yet_valid"),
    ],
)
def test_each_certificate_has_its_own_time(position: int, days: tuple[float, float], code: str) -> None:
    module = Module.create()
    spans = [(-3650.0, 3650.0), (-1.0, 1.0), (-0.1, 0.1)]
    spans[position] = days
    root = issue("root", days=spans[0])
    middle = issue("middle", root, days=spans[1])
    module.chain = [root, middle, issue("leaf", middle, ca=False, days=spans[2])]
    assert reason(module.evidence(), module) == code


def test_the_time_is_the_given_one() -> None:
    edge = MODULE.chain[-1].certificate
    start, end = edge.not_valid_before_utc.timestamp(), edge.not_valid_after_utc.timestamp()
    verify(GOOD, at=start), verify(GOOD, at=end)
    assert reason(GOOD, at=start - 1) == "certificate_not_yet_valid"
    assert reason(GOOD, at=end + 1) == "certificate_expired"


@pytest.mark.parametrize(
    ("issuer", "leaf"),
    [
        ({"ca": False}, {}),
        ({"ca": False, "key_cert_sign": True}, {}),
        ({"key_cert_sign": False}, {}),
        ({"constraints": False}, {}),
        ({"usage": False}, {}),
        ({"extra": x509.PolicyConstraints(0, None)}, {}),
        ({}, {"ca": True}),
        ({}, {"ca": True, "key_cert_sign": False}),
        ({}, {"usage": False}),
        ({}, {"digital_signature": False, "key_cert_sign": False}),
        ({}, {"key_cert_sign": True}),
        ({}, {"issuer_name": "somebody else"}),
        ({}, {"signed_by": ec.generate_private_key(ec.SECP384R1())}),
        ({}, {"extra": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")}),
    ],
    ids=str,
)
def test_certificates_that_may_not_do_what_they_do(issuer: dict[str, Any], leaf: dict[str, Any]) -> None:
    module = Module.create(issuer=issuer, leaf=leaf)
    assert reason(module.evidence(), module) == "chain"


@pytest.mark.parametrize(("size", "accepted"), [(400, True), (1000, False)])
def test_certificates_have_at_most_1024_bytes(size: int, accepted: bool) -> None:
    extra = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x04\x00" + bytes(size))
    module = Module.create(leaf={"extra": extra, "critical": False})
    assert (len(module.chain[-1].der) <= 1024) is accepted
    if accepted:
        verify(module.evidence(), module)
    else:
        assert reason(module.evidence(), module) == "malformed"


def test_path_length() -> None:
    root = issue("root")
    outer = issue("outer", root, path_length=0)
    inner = issue("inner", outer)
    module = Module([root, outer, inner, issue("leaf", inner, ca=False)])
    assert reason(module.evidence(), module) == "chain"
    outer = issue("outer", root, path_length=1)
    inner = issue("inner", outer)
    module = Module([root, outer, inner, issue("leaf", inner, ca=False)])
    verify(module.evidence(), module)


def test_a_leaf_that_signs_a_leaf() -> None:
    sub: Issued = issue("below", MODULE.chain[-1], ca=False)
    module = Module([*MODULE.chain, sub])
    assert reason(module.evidence(), module) == "chain"


def test_the_bundle_is_the_chain_and_nothing_else() -> None:
    root, middle, leaf = MODULE.chain
    stranger = issue("stranger", root)
    for bundle, code in (
        ([root, stranger, middle], "chain"),
        ([root, middle, middle], "chain"),
        ([root], "chain"),
        ([middle, root], "root_not_trusted"),
        ([middle], "root_not_trusted"),
        ([root, *[middle] * 7], "malformed"),
        ([], "malformed"),
    ):
        assert reason(MODULE.evidence(cabundle=[item.der for item in bundle])) == code
    assert reason(MODULE.evidence(certificate=leaf.der + b"\0")) == "malformed"
    assert leaf is MODULE.chain[-1]


def test_there_are_no_endorsements() -> None:
    with pytest.raises(EvidenceRefusedError) as refused:
        NitroVerifier([MODULE.root]).verify(GOOD, [MODULE.chain[0].der], at=NOW)
    assert refused.value.detail == "endorsement_unused"


# The document


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        *({name: ...} for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle")),
        *({name: None} for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle")),
        {"module_id": ""},
        {"module_id": b"i-0"},
        {"module_id": "i" * 129},
        {"digest": "SHA256"},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": True},
        {"timestamp": 1.5},
        {"timestamp": 2**53},
        {"pcrs": {}},
        {"pcrs": [bytes(48)]},
        {"pcrs": {0: PCRS[0], 1: PCRS[1]}},
        {"pcrs": {**PCRS, 32: bytes(48)}},
        {"pcrs": {**PCRS, -1: bytes(48)}},
        {"pcrs": {**PCRS, "3": bytes(48)}},
        {"pcrs": {0: PCRS[0], 2: PCRS[2], True: PCRS[1]}},
        {"pcrs": {**PCRS, 3: bytes(32)}},
        {"pcrs": {**PCRS, 3: "0" * 48}},
        {"certificate": b""},
        {"certificate": b"x" * 1025},
        {"certificate": "text"},
        {"cabundle": b"x"},
        {"cabundle": ["text"]},
        {"public_key": b""},
        {"public_key": b"x" * 1025},
        {"public_key": "text"},
        {"user_data": b"x" * 513},
        {"nonce": b"x" * 513},
        {"nonce": 7},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_signed_document_must_be_well_formed(changes: dict[str, Any]) -> None:
    assert reason(MODULE.evidence(**changes)) == "malformed"


def test_limits_of_the_optional_fields_are_included() -> None:
    verify(MODULE.evidence(public_key=b"x" * 1024, user_data=b"x" * 512, nonce=b"x" * 512))


# CBOR


def raw(payload: bytes) -> bytes:
    return sign1(payload, MODULE.chain[-1].key)


def test_strict_cbor_in_the_document() -> None:
    document = MODULE.document()
    good = cbor2.dumps(document)
    assert good[0] == 0xA9
    for payload in (
        b"\xaa" + good[1:] + cbor2.dumps("nonce") + cbor2.dumps(b"again"),  # a repeated key
        b"\xbf" + good[1:] + b"\xff",  # indefinite length
        b"\xb8\x09" + good[1:],  # not the shortest form
        good + b"\x00",  # something follows
        good[:-1],
        cbor2.dumps(cbor2.CBORTag(24, good)),
        cbor2.dumps({**document, "nonce": cbor2.CBORTag(25, 0)}),
        cbor2.dumps({**document, "timestamp": cbor2.CBORTag(2, b"\x05")}),
        cbor2.dumps({**document, "nonce": cbor2.CBORTag(35, "(a+)+$")}),
        cbor2.dumps({**document, "nonce": cbor2.CBORTag(5, [2**62, 1])}),
        cbor2.dumps({**document, "nonce": cbor2.CBORTag(999, b"n")}),
        cbor2.dumps([document]),
        cbor2.dumps(None),
        b"\x81" * 5 + b"\x00",
        b"\x81" * 16000,
        b"",
    ):
        assert reason(raw(payload)) == "malformed"


def test_strict_cbor_outside() -> None:
    parts = cbor2.loads(GOOD)
    for evidence in (
        b"",
        b"\xd2",
        b"\xd2\xd2" + GOOD,
        cbor2.dumps(cbor2.CBORTag(17, parts)),
        cbor2.dumps(cbor2.CBORTag(55799, parts)),
        b"\x9f" + GOOD[1:] + b"\xff",
        b"\x98\x04" + GOOD[1:],
        GOOD + b"\x00",
        GOOD[:-1],
        cbor2.dumps(parts[:3]),
        cbor2.dumps([*parts, b""]),
        cbor2.dumps({0: parts}),
        cbor2.dumps([ES384, *parts[1:]]),
        cbor2.dumps([parts[0], b"", *parts[2:]]),
        cbor2.dumps([parts[0], {}, None, parts[3]]),
        cbor2.dumps([parts[0], {}, b"", parts[3]]),
        cbor2.dumps([parts[0], {1: [[[[1]]]]}, *parts[2:]]),
        cbor2.dumps([parts[0], {}, bytes(MAX_PAYLOAD_BYTES + 1), parts[3]]),
        b"\x84" + b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x81" * (MAX_BYTES - 1),
        bytes(MAX_BYTES + 1),
    ):
        assert reason(evidence) == "malformed"


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert reason(data) in ("malformed", "algorithm", "signature")


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=60),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 40) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(MODULE.document())), _VALUES, min_size=1, max_size=2))
def test_any_fields_are_claims_or_malformed(changes: dict[str, Any]) -> None:
    """Nothing but the one typed error comes out of a document that its key has signed."""
    try:
        claims = verify(MODULE.evidence(**changes))
    except EvidenceRefusedError as refused:
        assert refused.detail in ("malformed", "signature", "root_not_trusted", "chain")
    else:
        assert set(claims.measurements) == {f"pcr{index}" for index in changes.get("pcrs", PCRS)}


def test_claims_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify(GOOD).debug = True  # type: ignore[misc]
    assert AT.timestamp() == NOW
