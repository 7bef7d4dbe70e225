"""Verifies the reports of NVIDIA GPUs against NVIDIA's device identity root, offline.

Evidence is what NVIDIA's attestation SDK writes: a JSON list with one object a GPU, of which `certificate` (base64 of
the PEM chain, the GPU's own first, the root last) and `evidence` (base64 of the report, see `spdm`) are read. Nothing
else in the object is signed, and so nothing else is believed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from typing import Annotated

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import UNREADABLE, leaf_key_p384, load_certificates_pem, verify_chain
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.nvidia.policy import MAX_GPUS
from tensorguard.evidence.nvidia.spdm import MAX_REPORT_BYTES, MeasurementReport

NVIDIA_DEVICE_IDENTITY_ROOT_SHA256 = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
"""SHA-256 of the DER of CN=NVIDIA Device Identity CA, valid from 2021-11-05."""

MAX_CHAIN_BYTES = 12 * 1024
MAX_EVIDENCE_BYTES = MAX_GPUS * 13 * 1024
"""A Hopper or Blackwell GPU takes 12 KiB."""
_DRIVER_VERSION, _VBIOS_VERSION, _FIRMWARE_ID = 3, 6, 20
_DICE_EXTENSIONS = tuple(map(x509.ObjectIdentifier, ("2.23.133.5.4.1", "2.23.133.5.4.1.1")))
_SHA384_DIGEST = bytes.fromhex("0609608648016503040202") + b"\x04\x30"
"""DER of the algorithm SHA-384 and the head of the 48-byte digest after it (TCG DICE attestation, FWID)."""


class _Device(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    certificate: Annotated[str, StringConstraints(max_length=4 * (MAX_CHAIN_BYTES // 3))]
    evidence: Annotated[str, StringConstraints(max_length=4 * (MAX_REPORT_BYTES // 3))]


_DEVICES = TypeAdapter(Annotated[list[_Device], Field(min_length=1, max_length=MAX_GPUS)])


class GpuVerifier:
    """Turns the authentic reports of a host's GPUs into claims."""

    def __init__(self, roots: Collection[str] = (NVIDIA_DEVICE_IDENTITY_ROOT_SHA256,)) -> None:
        """`roots`: SHA-256 fingerprints of root certificates, lower-case hex."""
        self._roots = frozenset(roots)

    def verify(self, evidence: bytes, *, at: float) -> tuple[GpuClaims, ...]:
        """The claims of each GPU, in order; chains as they stood at the Unix time `at`.

        Raises EvidenceRefusedError: `malformed`, `not_gpu` (an NVSwitch, say), `algorithm`, `signature`,
        `root_not_trusted`, `certificate_not_yet_valid`, `certificate_expired`, `chain`, `firmware_mismatch`,
        `duplicate_gpu` (one GPU cannot stand for two).
        """
        if len(evidence) > MAX_EVIDENCE_BYTES:
            raise EvidenceRefusedError(f"the evidence of GPUs is longer than {MAX_EVIDENCE_BYTES} bytes")
        try:
            devices = _DEVICES.validate_json(evidence)
        except ValidationError:
            raise EvidenceRefusedError(
                f"the evidence of GPUs is not a JSON list of 1 to {MAX_GPUS} objects with certificate and evidence"
            ) from None
        claims = tuple(self._verify(device, at) for device in devices)
        if len({gpu.device_id for gpu in claims}) != len(claims):
            raise EvidenceRefusedError("a GPU is listed twice", "duplicate_gpu")
        return claims

    def _verify(self, device: _Device, at: float) -> GpuClaims:
        chain = load_certificates_pem(_decode(device.certificate), MAX_CHAIN_BYTES)
        report = MeasurementReport.verify(_decode(device.evidence), leaf_key_p384(chain[0]))
        verify_chain(chain, roots=self._roots, at=at)
        if _DRIVER_VERSION not in report.opaque or _VBIOS_VERSION not in report.opaque:
            raise EvidenceRefusedError("the report names no driver and VBIOS: it is not a GPU's", "not_gpu")
        firmware = report.opaque.get(_FIRMWARE_ID)  # the oldest firmware does not report it
        if firmware is not None and firmware != _certified_firmware(chain[0]):
            raise EvidenceRefusedError(
                "the firmware in the report is not the one that the certificate is for", "firmware_mismatch"
            )
        identity = chain[1]
        return GpuClaims(
            nonce=report.nonce,
            device_id=_whole_bytes(identity.serial_number),
            model=_common_name(identity),
            driver_version=_text(report.opaque[_DRIVER_VERSION]),
            vbios_version=_vbios_version(report.opaque[_VBIOS_VERSION]),
            measurements={str(index): value.hex() for index, value in sorted(report.measurements.items())},
        )


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise EvidenceRefusedError("the evidence of a GPU is not base64") from None


def _certified_firmware(certificate: x509.Certificate) -> bytes | None:
    for extension in certificate.extensions:
        if extension.oid in _DICE_EXTENSIONS and isinstance(extension.value, x509.UnrecognizedExtension):
            _, found, rest = extension.value.value.partition(_SHA384_DIGEST)
            return rest[:48] if found else None
    return None


def _whole_bytes(number: int) -> str:
    """As `tensafe revoke chip` takes it, and `openssl x509 -serial` shows it."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big").hex()


def _common_name(certificate: x509.Certificate) -> str:
    try:
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except UNREADABLE:
        names = []
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise EvidenceRefusedError("the GPU's identity certificate has no common name")
    return names[0].value


def _text(value: bytes) -> str:
    text = value.rstrip(b"\0")
    if not 0 < len(text) <= 64 or not text.isascii() or not text.decode("ascii").isprintable():
        raise EvidenceRefusedError("the driver's version is not a short text")
    return text.decode("ascii")


def _vbios_version(value: bytes) -> str:
    """8 bytes, little endian: 00 a5 00 96 01 00 00 00 is written 96.00.A5.00.01."""
    if len(value) != 8:
        raise EvidenceRefusedError("the VBIOS version does not have 8 bytes", "not_gpu")
    number = value[::-1]
    return ".".join(f"{byte:02X}" for byte in (*number[4:8], number[3]))
