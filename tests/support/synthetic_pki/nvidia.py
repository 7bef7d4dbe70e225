"""Reports of GPUs of our own, under a root of our own."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tensorguard.evidence.certificates import fingerprint
from tests.support.synthetic_pki.certificates import Issued, issue

FIRMWARE = b"f" * 48
NONCE = b"n" * 32
MODEL = "GH100 A01 GSP BROM"
OPAQUE = {
    6: bytes.fromhex("00a5009601000000"),
    3: b"590.12\0",
    20: FIRMWARE,
}
MEASUREMENTS = {1: bytes(48), 2: b"\2" * 48, 3: b"\3" * 48}


def dice(firmware: bytes) -> x509.UnrecognizedExtension:
    """The extension that names a certificate's firmware, as far as it matters."""
    value = bytes.fromhex("303d06096086480165030402020430") + firmware
    return x509.UnrecognizedExtension(x509.ObjectIdentifier("2.23.133.5.4.1"), value)


def body(
    nonce: bytes = NONCE,
    *,
    request: bytes = b"\x11\xe0\x01\xff",
    response: bytes = b"\x11\x60\0\0",
    measurements: dict[int, bytes] | None = None,
    record: bytes | None = None,
    blocks: int | None = None,
    opaque: dict[int, bytes] | None = None,
    opaque_data: bytes | None = None,
    opaque_length: int | None = None,
) -> bytes:
    """What a report signs."""
    values = MEASUREMENTS if measurements is None else measurements
    if record is None:
        record = b"".join(
            struct.pack("<BBHBH", index, 1, len(value) + 3, 1, len(value)) + value for index, value in values.items()
        )
    if opaque_data is None:
        fields = OPAQUE if opaque is None else opaque
        opaque_data = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in fields.items())
    length = len(opaque_data) if opaque_length is None else opaque_length
    count = len(values) if blocks is None else blocks
    return (
        request
        + nonce
        + b"\0"
        + response
        + bytes([count])
        + len(record).to_bytes(3, "little")
        + record
        + b"r" * 32
        + length.to_bytes(2, "little")
        + opaque_data
    )


@dataclass
class Gpu:
    """One GPU with its chain, root first."""

    chain: list[Issued]

    @classmethod
    def create(
        cls,
        root: Issued | None = None,
        *,
        model: str = MODEL,
        leaf: dict[str, Any] | None = None,
        days: tuple[float, float] = (-1, 1),
        serial: int | None = None,
    ) -> Gpu:
        root = root or issue("NVIDIA Device Identity CA", days=days)
        identity = issue(model, root, days=days, serial=serial)
        options = {"ca": False, "constraints": False, "extra": dice(FIRMWARE), "critical": False, "days": days}
        options |= leaf or {}
        return cls([root, identity, issue("GSP FMC", identity, **options)])

    @property
    def root(self) -> str:
        return fingerprint(self.chain[0].certificate)

    @property
    def device_id(self) -> str:
        """The identity certificate's serial number as OpenSSL shows it, in lower case."""
        text = f"{self.chain[1].certificate.serial_number:x}"
        return "0" * (len(text) % 2) + text

    def report(self, nonce: bytes = NONCE, **changes: Any) -> bytes:
        return self.sign(body(nonce, **changes))

    def sign(self, signed: bytes) -> bytes:
        r, s = decode_dss_signature(self.chain[-1].key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return signed + r.to_bytes(48, "big") + s.to_bytes(48, "big")

    def device(self, report: bytes | None = None) -> dict[str, str]:
        pem = b"".join(item.certificate.public_bytes(serialization.Encoding.PEM) for item in reversed(self.chain))
        return {
            "arch": "HOPPER",
            "nonce": "00" * 32,
            "certificate": base64.b64encode(pem).decode(),
            "evidence": base64.b64encode(self.report() if report is None else report).decode(),
        }


def evidence(*devices: dict[str, str]) -> bytes:
    return json.dumps(devices).encode()
