"""P-384 certificates of a maker of our own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

AT = datetime(2026, 5, 28, 20, 26, 40, tzinfo=timezone.utc)
NOW = AT.timestamp()


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


def issue(
    name: str,
    issuer: Issued | None = None,
    *,
    ca: bool = True,
    path_length: int | None = None,
    constraints: bool = True,
    usage: bool = True,
    key_cert_sign: bool | None = None,
    digital_signature: bool = True,
    curve: ec.EllipticCurve | None = None,
    days: tuple[float, float] = (-1, 1),
    signed_by: ec.EllipticCurvePrivateKey | None = None,
    issuer_name: str | None = None,
    extra: x509.ExtensionType | None = None,
    critical: bool = True,
    serial: int | None = None,
) -> Issued:
    """A certificate, valid from and until so many days from `AT`. Without an issuer it is its own."""
    key = ec.generate_private_key(curve or ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by = issuer.certificate.subject if issuer else subject
    if issuer_name is not None:
        by = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer_name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(AT + timedelta(days=days[0]))
        .not_valid_after(AT + timedelta(days=days[1]))
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), ca)
    if usage:
        builder = builder.add_extension(
            x509.KeyUsage(
                digital_signature=digital_signature,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca if key_cert_sign is None else key_cert_sign,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    if extra is not None:
        builder = builder.add_extension(extra, critical=critical)
    signer = signed_by or (issuer.key if issuer else key)
    return Issued(builder.sign(signer, hashes.SHA384()), key)
