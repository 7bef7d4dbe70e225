"""The certificate of a VCEK or VLEK: which chip or provider, product and firmware version the key belongs to.

Extensions 1.3.6.1.4.1.3704.1.*: AMD's VCEK certificate and KDS interface specification (57230), 3.1; VLEK: 58369.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.product import Product

_ARC = "1.3.6.1.4.1.3704.1"
_STRUCT_VERSIONS = (0, 1)
_PRODUCT_NAME = f"{_ARC}.2"
_HWID = f"{_ARC}.4"
_CSP_ID = f"{_ARC}.5"
# Last arc of the extension (1.3.6.1.4.1.3704.1.3.*) for each byte of a TCB version.
_TCB_ARCS = {
    Product.MILAN: (1, 2, 4, 5, 6, 7, 3, 8),
    Product.GENOA: (1, 2, 4, 5, 6, 7, 3, 8),
    Product.TURIN: (9, 1, 2, 3, 5, 6, 7, 8),
}
_HWID_BYTES = {Product.MILAN: 64, Product.GENOA: 64, Product.TURIN: 8}
_CHIP_ID_BYTES = 64

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """A key that signs reports, as its certificate describes it."""

    certificate: x509.Certificate
    public_key: ec.EllipticCurvePublicKey
    signing_key: SigningKey
    product: Product
    chip_id: bytes | None
    """64 bytes as in a report; None for a VLEK."""
    csp_id: str | None
    """Provider of a VLEK; None for a VCEK."""
    tcb: bytes
    """Version the key is derived from, 8 bytes as in a report."""

    def is_valid(self, at: float) -> bool:
        """Whether the certificate's own time includes the Unix time `at`."""
        certificate = self.certificate
        return certificate.not_valid_before_utc.timestamp() <= at <= certificate.not_valid_after_utc.timestamp()


def is_endorsement_key(certificate: x509.Certificate) -> bool:
    """Whether a certificate says that it is one of a VCEK or VLEK."""
    return _PRODUCT_NAME in _extensions(certificate)


def parse_endorsement_key(certificate: x509.Certificate) -> EndorsementKey:
    """What the certificate says; whether AMD signed it is not yet known.

    Raises EvidenceRefusedError `malformed` unless it has exactly the fields that AMD gives such a key.
    """
    extensions = _extensions(certificate)
    key = _public_key(certificate)
    version = _der(extensions, f"{_ARC}.1", int)
    if version not in _STRUCT_VERSIONS:
        raise _malformed(f"version {version} of its extensions is not known")
    product = _product(_der(extensions, _PRODUCT_NAME, asn1.IA5String).as_str())
    levels = [_der(extensions, f"{_ARC}.3.{arc}", int) for arc in _TCB_ARCS[product]]
    if not all(0 <= level <= 0xFF for level in levels):
        raise _malformed("a firmware version is not a byte")
    if (_HWID in extensions) == (_CSP_ID in extensions):
        raise _malformed("it must name either a chip or a cloud provider")
    chip_id = csp_id = None
    if _HWID in extensions:
        chip_id = _hwid(extensions, _HWID_BYTES[product]).ljust(_CHIP_ID_BYTES, b"\0")
    else:
        csp_id = _der(extensions, _CSP_ID, asn1.IA5String).as_str()
    return EndorsementKey(
        certificate=certificate,
        public_key=key,
        signing_key=SigningKey.VCEK if chip_id else SigningKey.VLEK,
        product=product,
        chip_id=chip_id,
        csp_id=csp_id,
        tcb=bytes(levels),
    )


def _public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _malformed("its public key is not on P-384")
    return key


def _product(name: str) -> Product:
    """The line in a name like "Milan-B0", whose second part is a stepping."""
    for product in Product:
        if name.partition("-")[0] == product.label:
            return product
    raise _malformed(f"its product {name!r} is not known")


def _extensions(certificate: x509.Certificate) -> dict[str, bytes]:
    """Content of the extensions that cryptography has no type for, AMD's among them."""
    return {
        extension.oid.dotted_string: extension.value.value
        for extension in certificate.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }


def _hwid(extensions: dict[str, bytes], size: int) -> bytes:
    """AMD writes the chip's id bare; newer certificates may have it as an OCTET STRING."""
    content = extensions[_HWID]
    hwid = content if len(content) == size else _der(extensions, _HWID, bytes)
    if len(hwid) != size:
        raise _malformed(f"the chip id has {len(hwid)} bytes")
    return hwid


def _der(extensions: dict[str, bytes], oid: str, kind: type[_T]) -> _T:
    if oid not in extensions:
        raise _malformed(f"extension {oid} is missing")
    try:
        return asn1.decode_der(kind, extensions[oid])
    except ValueError:
        raise _malformed(f"extension {oid} is malformed") from None


def _malformed(problem: str) -> EvidenceRefusedError:
    return EvidenceRefusedError(
        f"a certificate of a VCEK or VLEK cannot be used: {problem}; supply the one AMD issued for this chip",
        "malformed",
    )
