"""Certificates of services (X.509, RFC 5280): what they say, how one is asked for, and the authority that issues one.

A certificate names a role and a tenant, and no host: addresses are the operator's to choose, and prove nothing. Both
are in its subject, and again in two made-up DNS names, so that TLS itself refuses a server that is another service
or another tenant's: the client says whom it expects in place of a host name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tensorguard.errors import AuthenticationError, ConfigurationError, InvalidInputError

DOMAIN = "tensafe.internal"
"""Never resolved: .internal is reserved for private use."""
MAX_REQUEST_BYTES = 2048
MAX_CERTIFICATE_BYTES = 4096
MAX_AUTHORITIES = 4
"""Trusted at a time. There are two in a rotation."""
AUTHORITY_LIFE_SECONDS = 10 * 365 * 86_400
CLOCK_SECONDS = 60
"""Certificates begin so much earlier than they are issued, for peers whose clock is behind."""

_PROBLEMS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class ServiceName:
    """A role, and the tenant it is played for; empty for a service of all tenants."""

    role: str
    tenant: str = ""

    @property
    def dns_name(self) -> str:
        """What a client expects of a server. The tenant's name is hashed: not every one could be part of a DNS name."""
        if not self.tenant:
            return f"{self.role}.{DOMAIN}"
        return f"{self.role}.{hashlib.sha256(self.tenant.encode()).hexdigest()[:32]}.{DOMAIN}"

    @property
    def dns_names(self) -> tuple[str, ...]:
        """All that its certificate has: one for clients that expect the tenant, one for those that expect the role."""
        return tuple(dict.fromkeys((self.dns_name, ServiceName(self.role).dns_name)))

    @property
    def subject(self) -> x509.Name:
        """Organisational unit: the role; organisation: the tenant, where there is one."""
        attributes = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, self.role)]
        if self.tenant:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.tenant))
        return x509.Name(attributes)

    def __str__(self) -> str:
        return f"{self.role} of {self.tenant}" if self.tenant else self.role


class Authority:
    """The key and the self-signed certificate that service certificates are issued with."""

    __slots__ = ("certificate", "private_key")

    def __init__(self, private_key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.private_key = private_key
        self.certificate = certificate

    @classmethod
    def generate(cls, now: float) -> Authority:
        """A new authority, in memory only."""
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"TenSafe attestor {identifier.digest.hex()[:16]}")])
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            _builder(name, name, key.public_key(), now, AUTHORITY_LIFE_SECONDS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.NameConstraints([x509.DNSName(DOMAIN)], None), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The certificate: what every service is given to know its peers by."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, hex."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issue(
        self, public_key: ec.EllipticCurvePublicKey, name: ServiceName, *, now: float, life_seconds: float
    ) -> x509.Certificate:
        """A certificate for both ends of TLS. It never outlives the authority's own."""
        issuer = self.certificate
        life = min(life_seconds, issuer.not_valid_after_utc.timestamp() - now)
        names = x509.SubjectAlternativeName([x509.DNSName(item) for item in name.dns_names])
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private_key.public_key())
        return (
            _builder(name.subject, issuer.subject, public_key, now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(purposes, critical=False)
            .add_extension(names, critical=False)
            .add_extension(by, critical=False)
            .sign(self.private_key, hashes.SHA256())
        )

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()})"


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PKCS #10 request (RFC 2986), DER. It has a key and nothing else: names are the attestor's to give."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def read_request(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a request that was signed with it. Raises InvalidInputError."""
    if not 0 < len(data) <= MAX_REQUEST_BYTES:
        raise InvalidInputError(f"a certificate request has 1 to {MAX_REQUEST_BYTES} bytes")
    try:
        request = x509.load_der_x509_csr(data)
        key = request.public_key()
        valid = request.is_signature_valid
    except (*_PROBLEMS, InvalidSignature):
        raise InvalidInputError("the certificate request is not PKCS #10") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInputError("certificates are issued for P-256 keys only")
    if not valid:
        raise InvalidInputError("the certificate request is not signed with its own key")
    return key


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 in PEM, as TLS and key files take it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_info(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_authorities(pem: bytes) -> tuple[x509.Certificate, ...]:
    """The certificates of an authority file: one, or more in a rotation. Raises ConfigurationError for others."""
    try:
        if len(pem) > MAX_AUTHORITIES * MAX_CERTIFICATE_BYTES:
            raise ValueError("too large")
        found = tuple(x509.load_pem_x509_certificates(pem))
        # One that is cut off is passed over, and a file that is half written would be another one.
        if not len(found) == pem.count(b"-----BEGIN ") <= MAX_AUTHORITIES:
            raise ValueError("too many, or not whole")
        authorities = all(
            certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for certificate in found
        )
    except (*_PROBLEMS, x509.ExtensionNotFound):
        authorities = False
    if not authorities:
        raise ConfigurationError(
            f"this is not one PEM certificate of an authority, or up to {MAX_AUTHORITIES}: make it with tensafe "
            "attestor authority"
        )
    return found


def read_name(certificate: x509.Certificate) -> ServiceName:
    """Whom a certificate names. Raises AuthenticationError for one that is no service's.

    Whether it is in time and by the right authority is for TLS, or for `check_issued`.
    """
    try:
        subject = {attribute.oid: str(attribute.value) for attribute in certificate.subject}
        name = ServiceName(subject.pop(NameOID.ORGANIZATIONAL_UNIT_NAME), subject.pop(NameOID.ORGANIZATION_NAME, ""))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if subject or tuple(names.get_values_for_type(x509.DNSName)) != name.dns_names:
            raise ValueError("not the names of a service")
    except (*_PROBLEMS, KeyError, x509.ExtensionNotFound):
        raise AuthenticationError("the certificate is not that of a service") from None
    return name


def check_issued(certificate: x509.Certificate, authorities: Iterable[x509.Certificate], now: float) -> None:
    """Raises AuthenticationError unless one of `authorities` issued the certificate, and it is in time."""
    if not any(_issued(certificate, authority) for authority in authorities):
        raise AuthenticationError("the certificate is not by the attestor's authority")
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if not begins <= now < ends:
        raise AuthenticationError("the certificate has ended, or has not begun: check both machines' clocks")


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_PROBLEMS, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, life: float
) -> x509.CertificateBuilder:
    issued = datetime.fromtimestamp(int(now), timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(issued - timedelta(seconds=CLOCK_SECONDS))
        .not_valid_after(issued + timedelta(seconds=int(life)))
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
