"""An Intel that tests make up: root, certificates, revocation lists, TCB information and quotes, all signed.

Formats: Intel's "SGX PCK Certificate and CRL Profile Specification", PCS API v4 (TCB info v3, QE identity v2) and the
TDX DCAP quote library's quote versions 4 and 5. Keys are fixed, so a failing test fails again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID, ObjectIdentifier

DAY = 24 * 3600
NOW = 1_780_000_000
"""The time everything here is valid at, unless a test says otherwise."""
FMSPC = bytes.fromhex("a0b0c0d0e0f0")
PPID = bytes(range(16))
MRTD = b"\x11" * 48
REPORT_DATA = bytes(range(64))
SGX_EXTENSION = "1.2.840.113741.1.13.1"
QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CPU_SVN = bytes([3] * 8 + [0] * 8)


def key(name: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of this name, always the same."""
    return ec.derive_private_key(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") >> 1, ec.SECP256R1())


def sign(private: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """r || s, 64 bytes."""
    r, s = decode_dss_signature(private.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


@dataclass(frozen=True)
class Times:
    """When something begins and ends, Unix seconds."""

    begins: int = NOW - DAY
    ends: int = NOW + 30 * DAY


@dataclass(frozen=True)
class Machine:
    """What a PCK certificate says about a platform."""

    ppid: bytes = PPID
    fmspc: bytes = FMSPC
    pce_svn: int = 11
    flags: tuple[bool, bool, bool] | None = (False, False, False)
    """Dynamic platform, cached keys, SMT; None as on a certificate of the processor CA."""


@dataclass(frozen=True)
class Pki:
    """The certificate authority. Change a field with `dataclasses.replace` for another one."""

    root_name: str = "root"
    root_times: Times = Times(NOW - 1000 * DAY, NOW + 1000 * DAY)
    ca_times: Times = Times(NOW - 500 * DAY, NOW + 500 * DAY)
    pck_times: Times = Times(NOW - 100 * DAY, NOW + 100 * DAY)
    signer_times: Times = Times(NOW - 100 * DAY, NOW + 100 * DAY)
    signer_key: str = "tcb"
    machine: Machine | None = Machine()
    """None: the PCK certificate says nothing about it."""

    @property
    def root(self) -> x509.Certificate:
        name = "Intel SGX Root CA"
        return _certificate(name, self.root_name, name, self.root_name, self.root_times, 1)

    @property
    def platform_ca(self) -> x509.Certificate:
        return _certificate(
            "Intel SGX PCK Platform CA", "platform", "Intel SGX Root CA", self.root_name, self.ca_times, 0
        )

    @property
    def pck(self) -> x509.Certificate:
        extension = _sgx_extension(self.machine) if self.machine else None
        return _certificate(
            "Intel SGX PCK Certificate", "pck", "Intel SGX PCK Platform CA", "platform", self.pck_times, None, extension
        )

    @property
    def tcb_signer(self) -> x509.Certificate:
        return _certificate(
            "Intel SGX TCB Signing", self.signer_key, "Intel SGX Root CA", self.root_name, self.signer_times, None
        )

    @property
    def root_fingerprint(self) -> str:
        return self.root.fingerprint(hashes.SHA256()).hex()

    @property
    def pck_chain(self) -> bytes:
        """As it stands in a quote."""
        return pem(self.pck, self.platform_ca, self.root)

    def root_crl(self, *revoked: x509.Certificate, times: Times = Times()) -> bytes:
        """DER, signed by the root."""
        return _crl("Intel SGX Root CA", self.root_name, revoked, times)

    def pck_crl(self, *revoked: x509.Certificate, times: Times = Times()) -> bytes:
        """DER, signed by the platform CA."""
        return _crl("Intel SGX PCK Platform CA", "platform", revoked, times)


@dataclass(frozen=True)
class Collateral:
    """What Intel publishes, each part signed. `files()` is what a verifier gets."""

    pki: Pki = Pki()
    status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    qe_status: str = "UpToDate"
    module_status: str = "UpToDate"
    evaluation: int = 17
    tcb_times: Times = Times()
    qe_times: Times = Times()
    fmspc: bytes = FMSPC
    minimum_pce_svn: int = 11
    root_crl: bytes | None = None
    pck_crl: bytes | None = None
    tcb_key: str = "tcb"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def tcb_info(self) -> str:
        """JSON text, as it is signed."""
        level = {
            "tcb": {
                "sgxtcbcomponents": [{"svn": svn} for svn in CPU_SVN],
                "pcesvn": self.minimum_pce_svn,
                "tdxtcbcomponents": [{"svn": svn} for svn in [3, 0, 3] + [0] * 13],
            },
            "tcbDate": "2026-01-01T00:00:00Z",
            "tcbStatus": self.status,
            **({"advisoryIDs": list(self.advisories)} if self.advisories else {}),
        }
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        return _json(
            {
                "id": "TDX",
                "version": 3,
                **_dates(self.tcb_times),
                "fmspc": self.fmspc.hex().upper(),
                "pceId": "0000",
                "tcbType": 0,
                "tcbEvaluationDataNumber": self.evaluation,
                "tdxModule": module,
                "tdxModuleIdentities": [
                    {
                        "id": "TDX_01",
                        **module,
                        "tcbLevels": [
                            {
                                "tcb": {"isvsvn": 3},
                                "tcbDate": "2026-01-01T00:00:00Z",
                                "tcbStatus": self.module_status,
                            }
                        ],
                    }
                ],
                "tcbLevels": [level],
                **self.extra,
            }
        )

    def qe_identity(self) -> str:
        """JSON text, as it is signed."""
        return _json(
            {
                "id": "TD_QE",
                "version": 2,
                **_dates(self.qe_times),
                "tcbEvaluationDataNumber": self.evaluation,
                "miscselect": "00000000",
                "miscselectMask": "FFFFFFFF",
                "attributes": "11000000000000000000000000000000",
                "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
                "mrsigner": "DC" * 32,
                "isvprodid": 2,
                "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": self.qe_status}],
            }
        )

    def parts(self) -> list[bytes]:
        """The answers of Intel's service, one file each."""
        return [
            self._answer("tcbInfo", self.tcb_info()),
            self._answer("enclaveIdentity", self.qe_identity()),
            pem(self.pki.tcb_signer, self.pki.root),
            self.root_crl if self.root_crl is not None else self.pki.root_crl(),
            self.pck_crl if self.pck_crl is not None else self.pki.pck_crl(),
        ]

    def _answer(self, name: str, text: str) -> bytes:
        return f'{{"{name}":{text},"signature":"{self._signature(text)}"}}'.encode()

    def _signature(self, text: str) -> str:
        return sign(key(self.tcb_key), text.encode()).hex()

    def bundle(self) -> bytes:
        """The same in one JSON file, as collateral services and tools hand it out."""
        tcb_info, qe_identity = self.tcb_info(), self.qe_identity()
        return json.dumps(
            {
                "pck_crl_issuer_chain": pem(self.pki.platform_ca, self.pki.root).decode(),
                "root_ca_crl": self.parts()[3].hex(),
                "pck_crl": self.parts()[4].hex(),
                "tcb_info_issuer_chain": pem(self.pki.tcb_signer, self.pki.root).decode(),
                "tcb_info": tcb_info,
                "tcb_info_signature": self._signature(tcb_info),
                "qe_identity_issuer_chain": pem(self.pki.tcb_signer, self.pki.root).decode(),
                "qe_identity": qe_identity,
                "qe_identity_signature": self._signature(qe_identity),
            }
        ).encode()


@dataclass(frozen=True)
class Quote:
    """A trust domain's report and everything that vouches for it."""

    pki: Pki = Pki()
    version: int = 4
    td_attributes: bytes = bytes.fromhex("0000001000000000")
    xfam: bytes = bytes.fromhex("e702060000000000")
    mrtd: bytes = MRTD
    mr_signer_seam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    rtmrs: tuple[bytes, bytes, bytes, bytes] = (b"\x20" * 48, b"\x21" * 48, b"\x22" * 48, b"\x23" * 48)
    report_data: bytes = REPORT_DATA
    tee_tcb_svn: bytes = bytes([3, 1, 3] + [0] * 13)
    mr_service_td: bytes = bytes(48)
    tee_type: int = 0x81
    qe_svn: int = 4
    qe_signer: bytes = b"\xdc" * 32
    pck_key: str = "pck"
    attestation_key: str = "attestation"
    hashed_key: str = "attestation"
    """The key whose hash the quoting enclave's report has."""
    chain: bytes | None = None
    padding: bytes = b""

    def body(self) -> bytes:
        """TDREPORT 1.0 for version 4, 1.5 for version 5."""
        report = b"".join(
            [
                self.tee_tcb_svn,
                b"\x5e" * 48,  # MRSEAM
                self.mr_signer_seam,
                self.seam_attributes,
                self.td_attributes,
                self.xfam,
                self.mrtd,
                b"\x0c" * 48,  # MRCONFIGID
                b"\x0d" * 48,  # MROWNER
                b"\x0e" * 48,  # MROWNERCONFIG
                *self.rtmrs,
                self.report_data,
            ]
        )
        if self.version == 4:
            return report
        report += self.tee_tcb_svn + self.mr_service_td
        return struct.pack("<HI", 3, len(report)) + report

    def encode(self) -> bytes:
        """The quote's bytes."""
        signed = struct.pack("<HHIHH16s20s", self.version, 2, self.tee_type, 0, 0, QE_VENDOR, bytes(20)) + self.body()
        attestation = _point(key(self.attestation_key))
        auth_data = bytes(range(32))
        hashed = hashlib.sha256(_point(key(self.hashed_key)) + auth_data).digest()
        qe_report = struct.pack(
            "<16sI28s16s32s32s32s96sHH60s64s",
            CPU_SVN,
            0,
            b"",
            bytes.fromhex("15000000000000000700000000000000"),
            b"\xee" * 32,
            b"",
            self.qe_signer,
            b"",
            2,
            self.qe_svn,
            b"",
            hashed,
        )
        chain = self.pki.pck_chain if self.chain is None else self.chain
        inner = (
            qe_report
            + sign(key(self.pck_key), qe_report)
            + struct.pack("<H", len(auth_data))
            + auth_data
            + struct.pack("<HI", 5, len(chain))
            + chain
        )
        auth = sign(key(self.attestation_key), signed) + attestation + struct.pack("<HI", 6, len(inner)) + inner
        return signed + struct.pack("<I", len(auth)) + auth + self.padding


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates one after the other."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def with_machine(pki: Pki, **changes: Any) -> Pki:
    """The same authority, for a machine that differs."""
    return replace(pki, machine=replace(pki.machine or Machine(), **changes))


def _certificate(
    subject: str,
    subject_key: str,
    issuer: str,
    issuer_key: str,
    times: Times,
    path_length: int | None,
    extension: bytes | None = None,
) -> x509.Certificate:
    """`path_length` None: not an authority."""
    authority = path_length is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key(subject_key).public_key())
        .serial_number(int.from_bytes(hashlib.sha256(f"{subject}{subject_key}".encode()).digest()[:19], "big") | 1)
        .not_valid_before(_time(times.begins))
        .not_valid_after(_time(times.ends))
        .add_extension(x509.BasicConstraints(authority, path_length), critical=True)
        .add_extension(_key_usage(authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key(subject_key).public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key(issuer_key).public_key()), critical=False)
        .add_extension(
            x509.CRLDistributionPoints(
                [
                    x509.DistributionPoint(
                        [x509.UniformResourceIdentifier("https://crl.invalid/intel.der")], None, None, None
                    )
                ]
            ),
            critical=False,
        )
    )
    if extension is not None:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(ObjectIdentifier(SGX_EXTENSION), extension), critical=False
        )
    return builder.sign(key(issuer_key), hashes.SHA256(), ecdsa_deterministic=True)


def _crl(issuer: str, issuer_key: str, revoked: Sequence[x509.Certificate], times: Times) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(issuer))
        .last_update(_time(times.begins))
        .next_update(_time(times.ends))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key(issuer_key).public_key()), critical=False)
    )
    for certificate in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(_time(times.begins))
            .build()
        )
    signed = builder.sign(key(issuer_key), hashes.SHA256(), ecdsa_deterministic=True)
    return signed.public_bytes(serialization.Encoding.DER)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Intel Corporation"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        ]
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=not authority,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _point(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)[
        1:
    ]


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _dates(times: Times) -> dict[str, str]:
    return {
        "issueDate": _time(times.begins).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "nextUpdate": _time(times.ends).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _sgx_extension(machine: Machine) -> bytes:
    """SEQUENCE of (OID, value) pairs, nested for the TCB and the configuration."""
    tcb = [(f"2.{number}", _integer(svn)) for number, svn in enumerate(CPU_SVN, 1)]
    tcb += [("2.17", _integer(machine.pce_svn)), ("2.18", _der(0x04, CPU_SVN))]
    fields = [
        ("1", _der(0x04, machine.ppid)),
        ("2", _pairs(tcb)),
        ("3", _der(0x04, bytes(2))),
        ("4", _der(0x04, machine.fmspc)),
        ("5", _der(0x0A, b"\x01")),
        ("6", _der(0x04, b"\x77" * 16)),
    ]
    if machine.flags is not None:
        flags = [(f"7.{i}", _der(0x01, b"\xff" if flag else b"\x00")) for i, flag in enumerate(machine.flags, 1)]
        fields.append(("7", _pairs(flags)))
    return _pairs(fields)


def _pairs(fields: Sequence[tuple[str, bytes]]) -> bytes:
    return _der(0x30, b"".join(_der(0x30, _oid(f"{SGX_EXTENSION}.{name}") + value) for name, value in fields))


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _oid(dotted: str) -> bytes:
    first, second, *rest = (int(part) for part in dotted.split("."))
    body = bytes([first * 40 + second])
    for number in rest:
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.append(number & 0x7F | 0x80)
        body += bytes(reversed(digits))
    return _der(0x06, body)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content
