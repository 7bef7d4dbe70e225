"""Verifies Nitro attestation documents against the root certificate of AWS, offline."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import leaf_key_p384, verify_chain
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.nitro.cose import Sign1
from tensorguard.evidence.nitro.document import AttestationDocument

AWS_NITRO_ROOT_G1_SHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""SHA-256 of the DER of CN=aws.nitro-enclaves, valid 2019-10-28 to 2049-10-28."""


class NitroVerifier:
    """Turns authentic Nitro documents into claims."""

    kind = EvidenceKind.NITRO

    def __init__(self, roots: Collection[str] = (AWS_NITRO_ROOT_G1_SHA256,)) -> None:
        """`roots`: SHA-256 fingerprints of root certificates, lower-case hex."""
        self._roots = frozenset(roots)

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        """Check the COSE signature, then the chain as it stood at the Unix time `at`.

        A document has its whole chain in it and AWS publishes no revocation lists for it, so that there are no
        endorsements. Raises EvidenceRefusedError: `malformed`, `algorithm`, `signature`, `root_not_trusted`,
        `certificate_not_yet_valid`, `certificate_expired`, `chain`, `endorsement_unused`.
        """
        for endorsement in endorsements:
            self.check_endorsement(endorsement)
        message = Sign1.parse(evidence)
        document = AttestationDocument.parse(message.payload)
        message.verify(leaf_key_p384(document.chain[0]))
        verify_chain(document.chain, roots=self._roots, at=at)
        return Claims(
            kind=self.kind,
            measurements={f"pcr{index}": value.hex() for index, value in sorted(document.pcrs.items())},
            report_data=document.user_data or b"",
            issued_at=document.timestamp // 1000,
            debug=document.debug,
            nonce=document.nonce or b"",
            details=NitroClaims(
                module_id=document.module_id,
                timestamp=document.timestamp,
                certificate_expires_at=int(min(item.not_valid_after_utc.timestamp() for item in document.chain)),
                public_key=document.public_key,
                user_data=document.user_data,
            ),
        )

    def check_endorsement(self, endorsement: bytes) -> None:
        """Raises EvidenceRefusedError (`endorsement_unused`): there are none."""
        raise EvidenceRefusedError("a Nitro document holds all its certificates", "endorsement_unused")
