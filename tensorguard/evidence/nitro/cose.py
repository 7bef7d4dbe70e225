"""COSE_Sign1 (RFC 9052, section 4.2) with one algorithm: ES384."""

from __future__ import annotations

from dataclasses import dataclass

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.nitro import cbor

TAG = b"\xd2"
"""CBOR tag 18, COSE_Sign1. A message may be tagged or not."""
ES384_HEADER = b"\xa1\x01\x38\x22"
"""The protected header {1 (alg): -35 (ES384)}, and nothing else."""
MAX_PAYLOAD_BYTES = 16384
MAX_BYTES = MAX_PAYLOAD_BYTES + 512
_COORDINATE_BYTES = 48


@dataclass(frozen=True, slots=True)
class Sign1:
    """A message whose signature has not been verified yet."""

    payload: bytes
    signature: bytes
    """r and s, 48 bytes each, big endian (RFC 9053, section 2.1)."""

    @classmethod
    def parse(cls, message: bytes) -> Sign1:
        """Raises EvidenceRefusedError: `malformed`, or `algorithm` when the protected header is not ES384's alone.

        The unprotected header is nobody's word: whatever it holds is ignored.
        """
        parts = cbor.loads(message.removeprefix(TAG), MAX_BYTES)
        if not isinstance(parts, list) or len(parts) != 4:
            raise EvidenceRefusedError("the evidence is not a COSE_Sign1 message")
        protected, unprotected, payload, signature = parts
        if not (isinstance(protected, bytes) and isinstance(unprotected, dict) and isinstance(payload, bytes)):
            raise EvidenceRefusedError("headers or payload of the COSE_Sign1 message have the wrong types")
        if protected != ES384_HEADER:
            raise EvidenceRefusedError("the protected header must name ES384 and nothing else", "algorithm")
        if not isinstance(signature, bytes) or len(signature) != 2 * _COORDINATE_BYTES:
            raise EvidenceRefusedError("an ES384 signature has 96 bytes", "signature")
        return cls(payload, signature)

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Raises EvidenceRefusedError (`signature`) unless `key` (P-384) signed the payload."""
        r, s = self.signature[:_COORDINATE_BYTES], self.signature[_COORDINATE_BYTES:]
        signed = cbor2.dumps(["Signature1", ES384_HEADER, b"", self.payload])
        try:
            key.verify(
                encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big")),
                signed,
                ec.ECDSA(hashes.SHA384()),
            )
        except InvalidSignature:
            raise EvidenceRefusedError(
                "the evidence is not signed by the certificate in it: it was changed, or it is not a Nitro document",
                "signature",
            ) from None
