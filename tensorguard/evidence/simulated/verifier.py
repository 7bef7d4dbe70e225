"""Verifies simulated evidence against the public key of a pinned test root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.simulated.document import (
    MAX_EVIDENCE_BYTES,
    SIGNATURE_BYTES,
    SIGNING_DOMAIN,
    SimulatedDocument,
)


class SimulatedVerifier:
    """Turns authentic simulated evidence into claims."""

    kind = EvidenceKind.SIMULATED

    def __init__(self, root: Ed25519PublicKey) -> None:
        self._root = root

    @classmethod
    def from_file(cls, root_public_key_file: Path) -> SimulatedVerifier:
        """`root_public_key_file`: PEM SubjectPublicKeyInfo. Raises ConfigurationError."""
        try:
            key = serialization.load_pem_public_key(root_public_key_file.read_bytes())
        except OSError as error:
            raise ConfigurationError(
                f"cannot read the simulated root's public key {root_public_key_file}: {error.strerror}"
            ) from None
        except ValueError:
            raise ConfigurationError(f"{root_public_key_file} is not a PEM public key") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigurationError(f"{root_public_key_file} does not hold an Ed25519 key")
        return cls(key)

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float = 0.0) -> Claims:
        """Raises EvidenceRefusedError unless the root signed exactly these bytes and they are well-formed.

        The root is a key without a certificate: there are no endorsements, and no time at which it ends.
        """
        for endorsement in endorsements:
            self.check_endorsement(endorsement)
        if not SIGNATURE_BYTES < len(evidence) <= MAX_EVIDENCE_BYTES:
            raise EvidenceRefusedError("the evidence has an impossible size", "malformed")
        document, signature = evidence[:-SIGNATURE_BYTES], evidence[-SIGNATURE_BYTES:]
        try:
            self._root.verify(signature, SIGNING_DOMAIN + document)
        except InvalidSignature:
            raise EvidenceRefusedError(
                "the evidence is not signed by the simulated root this attestor trusts; set simulated_root_key to the "
                "key file that belongs to this attestor",
                "signature",
            ) from None
        try:  # only now is the content worth parsing
            report = SimulatedDocument.model_validate_json(document)
        except ValidationError:
            raise EvidenceRefusedError("the evidence document is malformed", "malformed") from None
        if report.to_bytes() != document:
            raise EvidenceRefusedError("the evidence document is not canonical JSON", "malformed")
        return Claims(
            kind=self.kind,
            measurements={"code": report.measurement},
            report_data=bytes.fromhex(report.report_data),
            issued_at=report.issued_at,
            debug=report.debug,
            role=report.role,
        )

    def check_endorsement(self, endorsement: bytes) -> None:
        """Raises EvidenceRefusedError (`endorsement_unused`): there are none."""
        raise EvidenceRefusedError("simulated evidence has no endorsements", "endorsement_unused")
