from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.simulated.document import SIGNING_DOMAIN
from tensorguard.evidence.simulated.verifier import SimulatedVerifier

CODE = "ab" * 48
DATA = bytes(range(64))


@pytest.fixture
def evidence(state: DevelopmentState) -> bytes:
    platform = SimulatedPlatform(state.simulated_root_key, measurement=CODE, clock=lambda: 1000)
    return platform.collect(Binding(DATA, b"", b""), Role.COPROCESSOR).evidence


@pytest.fixture
def verifier(state: DevelopmentState) -> SimulatedVerifier:
    return SimulatedVerifier.from_file(state.simulated_root_public_key)


def test_claims_are_what_was_collected(evidence: bytes, verifier: SimulatedVerifier) -> None:
    claims = verifier.verify(evidence)
    assert claims.kind is EvidenceKind.SIMULATED
    assert claims.measurements == {"code": CODE}
    assert (claims.report_data, claims.role, claims.issued_at, claims.debug) == (
        DATA,
        Role.COPROCESSOR,
        1000,
        False,
    )


def test_no_byte_can_be_changed(evidence: bytes, verifier: SimulatedVerifier) -> None:
    for position in range(len(evidence)):
        for flip in (0x01, 0x20, 0x80):
            mutated = bytearray(evidence)
            mutated[position] ^= flip
            with pytest.raises(EvidenceRefusedError):
                verifier.verify(bytes(mutated))


@pytest.mark.parametrize("change", [lambda e: e[:-64], lambda e: b"", lambda e: e + b" ", lambda e: e * 20])
def test_unsigned_or_resized_is_refused(evidence: bytes, verifier: SimulatedVerifier, change: object) -> None:
    with pytest.raises(EvidenceRefusedError):
        verifier.verify(change(evidence))  # type: ignore[operator]


def test_another_root_is_refused(evidence: bytes, tmp_path: Path) -> None:
    other = initialise_development_state(tmp_path / "other", "tenant", measurement=CODE)
    with pytest.raises(EvidenceRefusedError) as refused:
        SimulatedVerifier.from_file(other.simulated_root_public_key).verify(evidence)
    assert refused.value.detail == "signature"


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"kind": "tdx"},
        {"version": 2},
        {"measurement": "ab"},
        {"role": "attestor"},
        {"issued_at": "now"},
        {"debug": 1},
        {"report_data": "00"},
    ],
)
def test_a_signed_document_must_still_be_well_formed(
    state: DevelopmentState, evidence: bytes, verifier: SimulatedVerifier, change: dict[str, object]
) -> None:
    document = json.dumps({**json.loads(evidence[:-64]), **change}, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(EvidenceRefusedError) as refused:
        verifier.verify(sign(state, document))
    assert refused.value.detail == "malformed"


def test_a_signed_document_must_be_canonical(
    state: DevelopmentState, evidence: bytes, verifier: SimulatedVerifier
) -> None:
    spaced = json.dumps(json.loads(evidence[:-64]), sort_keys=True).encode()
    with pytest.raises(EvidenceRefusedError):
        verifier.verify(sign(state, spaced))


def test_signature_of_another_purpose_is_refused(
    state: DevelopmentState, evidence: bytes, verifier: SimulatedVerifier
) -> None:
    with pytest.raises(EvidenceRefusedError):
        verifier.verify(sign(state, evidence[:-64], domain=b""))


def test_key_files_are_checked(state: DevelopmentState, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")
    wrong.chmod(0o600)
    with pytest.raises(ConfigurationError):
        SimulatedPlatform(wrong)
    with pytest.raises(ConfigurationError):
        SimulatedVerifier.from_file(wrong)
    with pytest.raises(ConfigurationError, match="missing"):
        SimulatedVerifier.from_file(tmp_path / "missing")
    state.simulated_root_key.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        SimulatedPlatform(state.simulated_root_key)


def sign(state: DevelopmentState, document: bytes, domain: bytes = SIGNING_DOMAIN) -> bytes:
    key = serialization.load_pem_private_key(state.simulated_root_key.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return document + key.sign(domain + document)
