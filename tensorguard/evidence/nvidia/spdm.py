"""The measurement report of an NVIDIA GPU: one SPDM 1.1 exchange (DMTF DSP0274 1.1, GET_MEASUREMENTS and MEASUREMENTS).

request:  version 0x11, code 0xE0, param1, param2, nonce (32), slot (1)
response: version 0x11, code 0x60, param1, param2, blocks (1), record length (3), record, nonce (32),
          opaque length (2), opaque data, signature (96: r and s, big endian)

Integers are little endian. The signature is ECDSA P-384 with SHA-384 over everything before it. Opaque data are
NVIDIA's own: type (2), length (2), value, repeated.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tensorguard.errors import EvidenceRefusedError

MAX_REPORT_BYTES = 16 * 1024
NONCE_BYTES = 32
SIGNATURE_BYTES = 96
_REQUEST = struct.Struct("<BBBB32sB")
_RESPONSE = struct.Struct("<BBBBB3s")
_BLOCK = struct.Struct("<BBHBH")
_OPAQUE = struct.Struct("<HH")
_SIGNED_REQUEST = (0x11, 0xE0, 0x01, 0xFF)
"""SPDM 1.1, GET_MEASUREMENTS, with a signature, all measurements."""
_MEASUREMENTS = (0x11, 0x60)
_DMTF = 1


@dataclass(frozen=True, slots=True)
class MeasurementReport:
    """A report whose signature has been verified."""

    nonce: bytes
    """Of the request, 32 bytes."""
    measurements: Mapping[int, bytes]
    """Block index, from 1, and value."""
    opaque: Mapping[int, bytes]
    """NVIDIA's field type and value."""

    @classmethod
    def verify(cls, report: bytes, key: ec.EllipticCurvePublicKey) -> MeasurementReport:
        """The content of a report that `key` (P-384) signed; it is parsed only then.

        Raises EvidenceRefusedError: `signature`, `malformed`.
        """
        smallest = _REQUEST.size + _RESPONSE.size + NONCE_BYTES + 2 + SIGNATURE_BYTES
        if not smallest <= len(report) <= MAX_REPORT_BYTES:
            raise EvidenceRefusedError(f"a GPU's report has {smallest} to {MAX_REPORT_BYTES} bytes")
        signed, signature = report[:-SIGNATURE_BYTES], report[-SIGNATURE_BYTES:]
        r, s = signature[: SIGNATURE_BYTES // 2], signature[SIGNATURE_BYTES // 2 :]
        try:
            key.verify(
                encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big")),
                signed,
                ec.ECDSA(hashes.SHA384()),
            )
        except InvalidSignature:
            raise EvidenceRefusedError(
                "the report is not signed by the GPU whose certificate is with it", "signature"
            ) from None
        return cls._parse(signed)

    @classmethod
    def _parse(cls, signed: bytes) -> MeasurementReport:
        *header, nonce, _slot = _REQUEST.unpack_from(signed)
        if tuple(header) != _SIGNED_REQUEST:
            raise EvidenceRefusedError("the report does not begin with a request for all measurements in SPDM 1.1")
        version, code, _, _, blocks, length = _RESPONSE.unpack_from(signed, _REQUEST.size)
        if (version, code) != _MEASUREMENTS:
            raise EvidenceRefusedError("the answer in the report is not SPDM 1.1 measurements")
        start = _REQUEST.size + _RESPONSE.size
        end = start + int.from_bytes(length, "little")
        opaque = end + NONCE_BYTES + 2
        if opaque > len(signed) or opaque + int.from_bytes(signed[opaque - 2 : opaque], "little") != len(signed):
            raise EvidenceRefusedError("the lengths in the report do not add up")
        measurements = _measurements(signed[start:end])
        if len(measurements) != blocks or not blocks:
            raise EvidenceRefusedError("the report has another number of measurements than it says, or none")
        return cls(nonce, measurements, _opaque(signed[opaque:]))


def _measurements(record: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position < len(record):
        if position + _BLOCK.size > len(record):
            raise EvidenceRefusedError("a measurement is cut short")
        index, specification, size, _kind, value_size = _BLOCK.unpack_from(record, position)
        value = record[position + _BLOCK.size : position + _BLOCK.size + value_size]
        if specification != _DMTF or size != value_size + 3 or len(value) != value_size:
            raise EvidenceRefusedError("a measurement is not in the DMTF's format")
        if not index or index in found:
            raise EvidenceRefusedError("a measurement's index is 0 or occurs twice")
        found[index] = value
        position += _BLOCK.size + value_size
    return found


def _opaque(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if position + _OPAQUE.size > len(data):
            raise EvidenceRefusedError("a field of the opaque data is cut short")
        kind, size = _OPAQUE.unpack_from(data, position)
        value = data[position + _OPAQUE.size : position + _OPAQUE.size + size]
        if len(value) != size or kind in found:
            raise EvidenceRefusedError("a field of the opaque data is cut short or occurs twice")
        found[kind] = value
        position += _OPAQUE.size + size
    return found
