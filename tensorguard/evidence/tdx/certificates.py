"""X.509 as Intel uses it: who issued what, when it is valid, what is revoked.

dcap-qvl verifies all of this once more, but has one message for every way to fail, and does not look at the root's own
time nor at the beginning of a revocation list's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import UNREADABLE


def load_certificates(data: bytes) -> list[x509.Certificate]:
    """Certificates from PEM, or one from DER. Raises ValueError unless all of each can be read."""
    try:
        pem = b"-----BEGIN" in data
        certificates = x509.load_pem_x509_certificates(data) if pem else [x509.load_der_x509_certificate(data)]
        for item in certificates:  # most fields are read when they are asked for: ask before anything is decided
            _ = item.subject, item.issuer, item.extensions, item.public_key()
    except UNREADABLE as error:
        raise ValueError("certificate") from error
    return certificates


def load_revocation_list(data: bytes) -> x509.CertificateRevocationList:
    """A revocation list from PEM or DER. Raises ValueError unless all of it can be read."""
    try:
        found = x509.load_pem_x509_crl(data) if b"-----BEGIN" in data else x509.load_der_x509_crl(data)
        _ = found.issuer, found.last_update_utc, found.next_update_utc, found.extensions, len(found)
    except UNREADABLE as error:
        raise ValueError("revocation list") from error
    return found


def check_chain(chain: Sequence[x509.Certificate]) -> None:
    """Each certificate is issued by the one behind it. Raises EvidenceRefusedError (`chain`)."""
    for certificate, issuer in itertools.pairwise(chain):
        if not is_issued(certificate, issuer):
            raise EvidenceRefusedError("a certificate in the quote was not issued by the next one", "chain")


def is_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """The issuer's name and key are those that the certificate is signed with."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def check_times(certificates: Sequence[x509.Certificate], at: float) -> None:
    """Raises EvidenceRefusedError (`certificate_expired`, `certificate_not_yet_valid`)."""
    for certificate in certificates:
        if at < certificate.not_valid_before_utc.timestamp():
            raise EvidenceRefusedError(f"{_name(certificate)} is not valid yet", "certificate_not_yet_valid")
        if at > certificate.not_valid_after_utc.timestamp():
            raise EvidenceRefusedError(f"{_name(certificate)} has expired", "certificate_expired")


def check_revocation(
    revoked: x509.CertificateRevocationList, issuer: x509.Certificate, certificates: Sequence[x509.Certificate]
) -> None:
    """The list is the issuer's (else `signature`) and has none of the certificates (else `revoked`)."""
    key = issuer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not revoked.is_signature_valid(key):
        raise EvidenceRefusedError("a revocation list is not signed by its issuer", "signature")
    for certificate in certificates:
        if revoked.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise EvidenceRefusedError(f"{_name(certificate)} is revoked", "revoked")


def to_pem(*certificates: x509.Certificate) -> bytes:
    """Certificates one after the other."""
    return b"".join(item.public_bytes(serialization.Encoding.PEM) for item in certificates)


def _name(certificate: x509.Certificate) -> str:
    return f"certificate {certificate.subject.rfc4514_string()!r}"
