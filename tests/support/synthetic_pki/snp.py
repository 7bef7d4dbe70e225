"""A maker of SEV-SNP chips: root, intermediate and endorsement keys, certificates, revocation lists and reports.

Built from the specifications (AMD 56860 and 57230), not from the code under test: `report` packs what `parse_report`
unpacks, field by field at the offsets of the specification's table.
"""

from __future__ import annotations

import datetime
import hashlib
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID, ObjectIdentifier

from tensorguard.evidence.snp.product import Product

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
AT = START.timestamp() + 86400.0
"""A time when everything is valid by default: certificates for a year from START, lists for a month."""
YEAR = datetime.timedelta(days=365)
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
DER = serialization.Encoding.DER
PEM = serialization.Encoding.PEM

LABEL = {Product.MILAN: "Milan", Product.GENOA: "Genoa", Product.TURIN: "Turin"}
CPUID = {Product.MILAN: (0x19, 0x01, 0x01), Product.GENOA: (0x19, 0x11, 0x01), Product.TURIN: (0x1A, 0x02, 0x01)}
HWID = {Product.MILAN: bytes(range(64)), Product.GENOA: bytes(range(64)), Product.TURIN: bytes(range(1, 9))}
SPL = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8, "fmc": 9}
"""Last arc of the certificate extension for each firmware version."""
TCB = {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}
CSP_ID = "CN=cloud.example"


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """The same key for the same name throughout a run. 2048 bits, as AMD's 4096 take seconds to make."""
    return rsa.generate_private_key(65537, 2048)


@cache
def ec_key(name: str, curve: type[ec.EllipticCurve] = ec.SECP384R1) -> ec.EllipticCurvePrivateKey:
    """The same key for the same name throughout a run."""
    return ec.generate_private_key(curve())


def name(common_name: str) -> x509.Name:
    """As AMD writes names, apart from what identifies it."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Synthetic Micro Devices"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def tcb_bytes(product: Product, *, bootloader: int, tee: int, snp: int, microcode: int, fmc: int = 0) -> bytes:
    """TCB_VERSION: Turin's has other places than the ones before."""
    if product is Product.TURIN:
        return bytes([fmc, bootloader, tee, snp, 0, 0, 0, microcode])
    return bytes([bootloader, tee, 0, 0, 0, 0, snp, microcode])


def issue(
    issuer: str,
    signer: rsa.RSAPrivateKey,
    subject: str,
    public_key: Any,
    extensions: list[tuple[x509.ExtensionType, bool]],
    *,
    start: datetime.datetime = START,
    life: datetime.timedelta = YEAR,
    pss: padding.AsymmetricPadding = PSS,
    digest: hashes.HashAlgorithm | None = None,
) -> x509.Certificate:
    """A certificate for `subject`. `extensions`: with whether they are critical."""
    builder = (
        x509.CertificateBuilder()
        .issuer_name(name(issuer))
        .subject_name(name(subject))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + life)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, digest or hashes.SHA384(), rsa_padding=pss)


@dataclass(frozen=True)
class Authority:
    """Issues certificates and revocation lists."""

    common_name: str
    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(DER)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.der).hexdigest()

    def revoke(
        self,
        *certificates: x509.Certificate,
        number: int = 7,
        start: datetime.datetime = START,
        life: datetime.timedelta = datetime.timedelta(days=30),
        extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (),
        signer: rsa.RSAPrivateKey | None = None,
    ) -> bytes:
        """A revocation list, DER."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(name(self.common_name))
            .last_update(start)
            .next_update(start + life)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        for certificate in certificates:
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(start)
            builder = builder.add_revoked_certificate(entry.build())
        crl = builder.sign(signer or self.key, hashes.SHA384(), rsa_padding=PSS)
        return crl.public_bytes(DER)


def authority(
    common_name: str,
    issuer: Authority | None = None,
    *,
    key: str = "",
    ca: bool = True,
    path_length: int | None = None,
    cert_sign: bool = True,
    crl_sign: bool = True,
    **options: Any,
) -> Authority:
    """A root, or an intermediate below `issuer`. `key`: its name, default the common name. `options`: of `issue`."""
    private = rsa_key(key or common_name)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca, path_length), True),
        (key_usage(key_cert_sign=cert_sign, crl_sign=crl_sign), True),
    ]
    by, signer = (common_name, private) if issuer is None else (issuer.common_name, issuer.key)
    certificate = issue(by, signer, common_name, private.public_key(), extensions, **options)
    return Authority(common_name, private, certificate)


@cache
def root(label: str) -> Authority:
    """The one root of a product."""
    return authority(f"ARK-{label}")


def key_usage(**allowed: bool) -> x509.KeyUsage:
    """The named usages and no others."""
    usages = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usages += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{usage: allowed.get(usage, False) for usage in usages})


@dataclass(frozen=True)
class Chip:
    """A chip of a product whose key is certified: what makes evidence."""

    product: Product
    signing_key: str
    ark: Authority
    ask: Authority
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    tcb: Mapping[str, int]

    @property
    def roots(self) -> dict[str, Product]:
        """What a verifier that trusts this maker is made with."""
        return {self.ark.sha256: self.product}

    @property
    def endorsements(self) -> list[bytes]:
        return [self.certificate.public_bytes(DER), self.ask.der, self.ark.der]

    def report(self, **changes: Any) -> bytes:
        """A signed report of this chip. `changes`: of `report`."""
        version = changes.pop("version", 5 if self.product is Product.TURIN else 3)
        fields: dict[str, Any] = {
            "version": version,
            "key_bits": (self.signing_key == "vlek") << 2,
            "chip_id": HWID[self.product] if self.signing_key == "vcek" else b"",
            "cpuid": CPUID[self.product] if version >= 3 else (0, 0, 0),
            **{
                f"{kind}_tcb": tcb_bytes(self.product, **self.tcb)
                for kind in ("reported", "current", "committed", "launch")
            },
            **changes,
        }
        return sign(report(**fields), self.key)


def chip(
    product: Product = Product.MILAN,
    signing_key: str = "vcek",
    *,
    ark: Authority | None = None,
    ask: Authority | None = None,
    key: Any = None,
    tcb: Mapping[str, int] = MappingProxyType({}),
    amd: Mapping[str, bytes | None] = MappingProxyType({}),
    more: Sequence[tuple[x509.ExtensionType, bool]] = (),
    subject: str | None = None,
    **options: Any,
) -> Chip:
    """A chip with its chain.

    `amd`: other values of AMD's extensions by last arcs ("4", "3.8"), None to leave one out. `more`: further
    extensions. `options`: of `issue`, for the endorsement key's certificate.
    """
    label = LABEL[product]
    ark = ark or root(label)
    ask = ask or authority(f"SEV-{label}" if signing_key == "vcek" else f"SEV-VLEK-{label}", ark, path_length=0)
    key = key or ec_key(f"{signing_key}-{label}")
    versions = {**TCB, **({"fmc": 1} if product is Product.TURIN else {}), **tcb}
    values = {**amd_extensions(product, signing_key, versions), **amd}
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.UnrecognizedExtension(ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{arcs}"), value), False)
        for arcs, value in values.items()
        if value is not None
    ]
    subject = subject or f"SEV-{signing_key.upper()}"
    certificate = issue(ask.common_name, ask.key, subject, key.public_key(), [*extensions, *more], **options)
    return Chip(product, signing_key, ark, ask, certificate, key, versions)


def amd_extensions(product: Product, signing_key: str, tcb: Mapping[str, int]) -> dict[str, bytes | None]:
    """1.3.6.1.4.1.3704.1.*, by last arcs: each an INTEGER, an IA5String or bare bytes."""
    levels = {f"3.{SPL[part]}": der_integer(level) for part, level in tcb.items()}
    reserved = (5, 6, 7) if product is Product.TURIN else (4, 5, 6, 7)
    owner = {"4": HWID[product]} if signing_key == "vcek" else {"5": der_text(CSP_ID)}
    stepping = "-B0" if product is Product.MILAN and signing_key == "vcek" else ""
    return {
        "1": der_integer(1 if product is Product.TURIN else 0),
        "2": der_text(LABEL[product] + stepping),
        **levels,
        **{f"3.{spl}": der_integer(0) for spl in reserved},
        **owner,
    }


def der_integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([2, len(content)]) + content


def der_text(value: str) -> bytes:
    return bytes([22, len(value)]) + value.encode()


def report(
    *,
    version: int = 3,
    guest_svn: int = 0,
    policy: int = 0x30000,
    family_id: bytes = b"",
    image_id: bytes = b"",
    vmpl: int = 0,
    algorithm: int = 1,
    current_tcb: bytes = b"",
    platform: int = 0x25,
    key_bits: int = 0,
    report_data: bytes = b"r" * 64,
    measurement: bytes = b"m" * 48,
    host_data: bytes = b"",
    id_key_digest: bytes = b"",
    author_key_digest: bytes = b"",
    reported_tcb: bytes = b"",
    cpuid: tuple[int, int, int] = (0x19, 1, 1),
    chip_id: bytes = b"",
    committed_tcb: bytes = b"",
    launch_tcb: bytes = b"",
    mitigations: tuple[int, int] | None = None,
) -> bytes:
    """A report of 1184 bytes whose signature is zero."""
    data = bytearray(1184)

    def put(offset: int, size: int, value: bytes) -> None:
        assert len(value) <= size
        data[offset : offset + len(value)] = value

    struct.pack_into("<IIQ", data, 0, version, guest_svn, policy)
    put(0x10, 16, family_id)
    put(0x20, 16, image_id)
    struct.pack_into("<II", data, 0x30, vmpl, algorithm)
    put(0x38, 8, current_tcb)
    struct.pack_into("<QI", data, 0x40, platform, key_bits)
    put(0x50, 64, report_data)
    put(0x90, 48, measurement)
    put(0xC0, 32, host_data)
    put(0xE0, 48, id_key_digest)
    put(0x110, 48, author_key_digest)
    put(0x140, 32, b"i" * 32)
    put(0x160, 32, b"\xff" * 32)
    put(0x180, 8, reported_tcb)
    put(0x188, 3, bytes(cpuid))
    put(0x1A0, 64, chip_id)
    put(0x1E0, 8, committed_tcb)
    put(0x1E8, 3, bytes([29, 55, 1]))
    put(0x1EC, 3, bytes([28, 55, 1]))
    put(0x1F0, 8, launch_tcb)
    launch, current = mitigations or ((63, 63) if version >= 5 else (0, 0))
    struct.pack_into("<QQ", data, 0x1F8, launch, current)
    return bytes(data)


def sign(unsigned: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The report with R and S as 72 bytes each, little endian."""
    r, s = decode_dss_signature(key.sign(unsigned[:0x2A0], ec.ECDSA(hashes.SHA384())))
    return unsigned[:0x2A0] + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)


def certificate_table(entries: list[tuple[str, bytes]]) -> bytes:
    """GHCB specification, 4.1.8.1: GUIDs with offsets and lengths, an entry of zeros, then the certificates."""
    header, body = b"", b""
    start = 24 * (len(entries) + 1)
    for guid, content in entries:
        header += uuid.UUID(guid).bytes + struct.pack("<II", start + len(body), len(content))
        body += content
    return header + bytes(24) + body
