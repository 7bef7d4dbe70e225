"""The chain of an endorsement key: signed by an ASK or ASVK, which is signed by a trusted ARK, and revoked by neither.

All signatures are RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes (AMD 57230, 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import fingerprint
from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.endorsement_key import EndorsementKey
from tensorguard.evidence.snp.endorsements import Endorsements
from tensorguard.evidence.snp.product import Product

AMD_ROOTS: Mapping[str, Product] = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": Product.MILAN,
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": Product.GENOA,
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": Product.TURIN,
}
"""SHA-256 of the ARK certificates (DER) at kdsintf.amd.com. VCEK and VLEK chains of a product end in the same ARK."""

_SALT_BYTES = 48
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)
_INTERMEDIATE = {SigningKey.VCEK: "SEV-", SigningKey.VLEK: "SEV-VLEK-"}


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """What a chain ended in."""

    product: Product
    crl_number: int | None
    """Highest number of the revocation lists it was checked against, None when there was none."""


def verify_chain(
    key: EndorsementKey, supplied: Endorsements, roots: Mapping[str, Product], *, at: float
) -> VerifiedChain:
    """Check the chain of `key` at the Unix time `at`. `roots`: SHA-256 of trusted ARK certificates and their products.

    Raises EvidenceRefusedError: `collateral_missing`, `chain`, `root_not_trusted`, `product_mismatch`,
    `certificate_expired`, `certificate_not_yet_valid`, `revoked`, or for a revocation list `signature`,
    `malformed`, `collateral_expired` and `collateral_not_yet_valid`.
    """
    intermediate = _issuer(key.certificate, supplied.certificates)
    root = _issuer(intermediate, supplied.certificates)
    product = roots.get(fingerprint(root))
    if product is None:
        raise EvidenceRefusedError(
            f"{_name(root)} is not a root that this verifier trusts; supply AMD's own ARK", "root_not_trusted"
        )
    if product is not key.product or _name(intermediate) != f"{_INTERMEDIATE[key.signing_key]}{product.label}":
        raise EvidenceRefusedError(
            f"a {key.signing_key.value.upper()} of {key.product.label} cannot be signed by {_name(intermediate)}",
            "product_mismatch",
        )
    _check_authority(root, below=1)
    _check_authority(intermediate, below=0)
    _check_leaf(key.certificate)
    chain = (root, intermediate, key.certificate)
    for certificate in chain:
        _check_critical_extensions(certificate)
        _check_validity(certificate, at)
    lists = [crl for crl in supplied.revocation_lists if crl.issuer == root.subject]
    numbers = [_check_revocation(crl, root, chain, at) for crl in lists]
    return VerifiedChain(product, max(numbers, default=None))


def _issuer(certificate: x509.Certificate, candidates: Sequence[x509.Certificate]) -> x509.Certificate:
    """The candidate whose key signed the certificate. A root is its own."""
    named = [candidate for candidate in candidates if candidate.subject == certificate.issuer]
    if not named:
        raise EvidenceRefusedError(
            f"the certificate of {_name(certificate)}'s issuer is missing; supply AMD's ASK and ARK for the product",
            "collateral_missing",
        )
    for candidate in named:
        if _is_signed_by(certificate, candidate):
            return candidate
    raise EvidenceRefusedError(f"the certificate of {_name(certificate)} is not signed by its issuer", "chain")


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)  # also: both places that name the algorithm agree
        _verify_signature(issuer, certificate, certificate.tbs_certificate_bytes)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _verify_signature(
    issuer: x509.Certificate, signed: x509.Certificate | x509.CertificateRevocationList, data: bytes
) -> None:
    """Raises InvalidSignature, also for every other algorithm or parameter than AMD's."""
    key = issuer.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise InvalidSignature
    # The count of unused bits before the signature, not signed itself, must be 0; cryptography accepts others.
    if not signed.public_bytes(serialization.Encoding.DER).endswith(b"\0" + signed.signature):
        raise InvalidSignature
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), _SALT_BYTES)
    key.verify(signed.signature, data, pss, hashes.SHA384())


def _check_authority(certificate: x509.Certificate, *, below: int) -> None:
    """May sign certificates, with `below` authorities between it and the end."""
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise EvidenceRefusedError(f"{_name(certificate)} is not a certificate authority", "chain")
    if constraints.path_length is not None and constraints.path_length < below:
        raise EvidenceRefusedError(f"{_name(certificate)} may not have an authority below it", "chain")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        raise EvidenceRefusedError(f"the key of {_name(certificate)} is not for signing certificates", "chain")


def _check_leaf(certificate: x509.Certificate) -> None:
    """Signs reports and nothing else. AMD's have neither extension; where one is, it must not say otherwise."""
    constraints = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    if (constraints is not None and constraints.ca) or (usage is not None and not usage.digital_signature):
        raise EvidenceRefusedError(f"the key of {_name(certificate)} is not for signing reports", "chain")


def _check_critical_extensions(certificate: x509.Certificate) -> None:
    """Whoever does not know what a critical extension means must not accept the certificate (RFC 5280, 4.2)."""
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, (x509.BasicConstraints, x509.KeyUsage)):
            raise EvidenceRefusedError(
                f"{_name(certificate)} has a critical extension {extension.oid.dotted_string} that is not known",
                "chain",
            )


def _check_validity(certificate: x509.Certificate, at: float) -> None:
    if at < certificate.not_valid_before_utc.timestamp():
        raise EvidenceRefusedError(
            f"{_name(certificate)} is valid only from {certificate.not_valid_before_utc.isoformat()}; check the clock",
            "certificate_not_yet_valid",
        )
    if not at <= certificate.not_valid_after_utc.timestamp():
        raise EvidenceRefusedError(
            f"{_name(certificate)} expired at {certificate.not_valid_after_utc.isoformat()}; supply a new one",
            "certificate_expired",
        )


def _check_revocation(
    crl: x509.CertificateRevocationList, root: x509.Certificate, chain: Sequence[x509.Certificate], at: float
) -> int:
    """The list's number, if it is the root's, in its time and names nothing of the chain."""
    if not _is_list_of(crl, root):
        raise EvidenceRefusedError(f"the revocation list of {_name(root)} is not signed by it", "signature")
    number = _list_number(crl)
    if at < crl.last_update_utc.timestamp():
        raise EvidenceRefusedError(
            f"the revocation list is valid only from {crl.last_update_utc.isoformat()}; check the clock",
            "collateral_not_yet_valid",
        )
    if crl.next_update_utc is None or not at < crl.next_update_utc.timestamp():
        raise EvidenceRefusedError(
            f"the revocation list was due to be replaced at {crl.next_update_utc}; replace it by the newest",
            "collateral_expired",
        )
    for certificate in chain:
        # Whichever issuer an entry names: revoking too much is the safe mistake.
        if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise EvidenceRefusedError(f"AMD revoked the certificate of {_name(certificate)}", "revoked")
    return number


def _is_list_of(crl: x509.CertificateRevocationList, root: x509.Certificate) -> bool:
    key = root.public_key()
    usage = _extension(root, x509.KeyUsage)
    if not isinstance(key, rsa.RSAPublicKey) or usage is None or not usage.crl_sign:
        return False
    try:
        _verify_signature(root, crl, crl.tbs_certlist_bytes)
        return crl.is_signature_valid(key)
    except (InvalidSignature, ValueError, TypeError):
        return False


def _list_number(crl: x509.CertificateRevocationList) -> int:
    """Of a complete list: a critical extension, such as a delta list's, would mean that this is only a part."""
    if any(extension.critical for extension in crl.extensions):
        raise EvidenceRefusedError("the revocation list is not a complete one; supply AMD's whole list", "malformed")
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _name(certificate: x509.Certificate) -> str:
    """The common name, for messages and for the names AMD gives."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else "a certificate without a name"
