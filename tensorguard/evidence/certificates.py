"""Certificate chains of platform makers, validated as they stood at a given time (RFC 5280, section 6)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timezone

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from tensorguard.errors import EvidenceRefusedError

MAX_CHAIN = 8
UNREADABLE = (
    OverflowError,
    TypeError,
    UnsupportedAlgorithm,
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for certificates and revocation lists that are none, some of it late."""


def load_certificate(der: bytes, max_bytes: int) -> x509.Certificate:
    """The certificate in `der`. Raises EvidenceRefusedError (`malformed`)."""
    if not 0 < len(der) <= max_bytes:
        raise EvidenceRefusedError(f"a certificate in the evidence is empty or longer than {max_bytes} bytes")
    try:
        certificate = x509.load_der_x509_certificate(der)
        # Parsed when first asked for, and asked for below.
        _ = certificate.subject, certificate.not_valid_before_utc, certificate.not_valid_after_utc
        _ = certificate.extensions
    except UNREADABLE:
        raise EvidenceRefusedError("a certificate in the evidence cannot be parsed") from None
    return certificate


def load_certificates_pem(pem: bytes, max_bytes: int) -> list[x509.Certificate]:
    """The certificates in `pem`, in order, at most `MAX_CHAIN`. Raises EvidenceRefusedError (`malformed`)."""
    if not 0 < len(pem) <= max_bytes or pem.count(b"-----BEGIN") > MAX_CHAIN:
        raise EvidenceRefusedError(f"a certificate chain is empty, or longer than {max_bytes} bytes or {MAX_CHAIN}")
    try:
        ders = [item.public_bytes(serialization.Encoding.DER) for item in x509.load_pem_x509_certificates(pem)]
    except UNREADABLE:
        raise EvidenceRefusedError("a certificate chain in the evidence cannot be parsed") from None
    return [load_certificate(der, max_bytes) for der in ders]


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the certificate's DER, lower-case hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def leaf_key_p384(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The P-384 key that a certificate is for. Raises EvidenceRefusedError: `algorithm` for another, `malformed`."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise EvidenceRefusedError("the key of the certificate that signs the evidence cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceRefusedError("the certificate that signs the evidence is not for a P-384 key", "algorithm")
    return key


def verify_chain(chain: Sequence[x509.Certificate], *, roots: Collection[str], at: float) -> None:
    """`chain`: the certificate that signs evidence first, the root last; every one of them is needed.

    `roots`: SHA-256 fingerprints (`fingerprint`) of the roots that are trusted. `at`: Unix seconds.

    Raises EvidenceRefusedError: `root_not_trusted`, `certificate_not_yet_valid` or `certificate_expired` for any
    certificate of the chain, and `chain` when a signature, a name, a path length, a key usage (critical
    basicConstraints and keyCertSign of issuers, digitalSignature of the first) or an unknown critical extension is
    in the way.
    """
    if not 2 <= len(chain) <= MAX_CHAIN:
        raise EvidenceRefusedError(f"the chain has {len(chain)} certificates; 2 to {MAX_CHAIN} are expected", "chain")
    if fingerprint(chain[-1]) not in roots:
        raise EvidenceRefusedError(
            "the chain ends in a root certificate that is not the platform maker's", "root_not_trusted"
        )
    # Asked here for reasons of their own; the path validation below checks the time again.
    moment = datetime.fromtimestamp(at, timezone.utc)
    for certificate in chain:
        name = certificate.subject.rfc4514_string()
        if moment < certificate.not_valid_before_utc:
            raise EvidenceRefusedError(
                f"certificate {name:.100} is valid only from {certificate.not_valid_before_utc}; check the clocks",
                "certificate_not_yet_valid",
            )
        if moment > certificate.not_valid_after_utc:
            raise EvidenceRefusedError(
                f"certificate {name:.100} was valid until {certificate.not_valid_after_utc}; collect new evidence",
                "certificate_expired",
            )
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store([chain[-1]]))
        .time(moment)
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(ca_policy=_ISSUER, ee_policy=_SIGNER)
        .build_client_verifier()
    )
    try:
        path = verifier.verify(chain[0], list(chain[1:-1])).chain
    except (verification.VerificationError, ValueError) as error:
        raise EvidenceRefusedError(f"the certificate chain does not hold: {error!s:.200}", "chain") from None
    if list(path) != list(chain):
        raise EvidenceRefusedError("the chain has certificates that do not belong to it", "chain")


def _signs_certificates(_policy: verification.Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.key_cert_sign:
        raise ValueError("the key of an issuer may not sign certificates")


def _signs(_policy: verification.Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature or usage.key_cert_sign:
        raise ValueError("the key of the first certificate is not for digital signatures alone")


def _is_no_issuer(
    _policy: verification.Policy, _certificate: x509.Certificate, constraints: x509.BasicConstraints | None
) -> None:
    if constraints is not None and constraints.ca:
        raise ValueError("the first certificate is an issuer's")


_ISSUER = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, verification.Criticality.CRITICAL, None)
    .require_present(x509.KeyUsage, verification.Criticality.CRITICAL, _signs_certificates)
)
_SIGNER = (
    verification.ExtensionPolicy.permit_all()
    .may_be_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, _is_no_issuer)
    .require_present(x509.KeyUsage, verification.Criticality.AGNOSTIC, _signs)
)
