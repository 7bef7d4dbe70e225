"""Nitro documents of a security module of our own, under a root of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tensorguard.evidence.certificates import fingerprint
from tests.support.synthetic_pki.certificates import NOW, Issued, issue

ES384 = {1: -35}
PCRS = {index: bytes([index + 1]) * 48 if index in (0, 1, 2, 4, 8) else bytes(48) for index in range(16)}
REGISTERS = {f"pcr{index}": PCRS[index].hex() for index in (0, 1, 2)}


def sign1(
    payload: bytes,
    key: ec.EllipticCurvePrivateKey,
    *,
    protected: bytes = cbor2.dumps(ES384),
    unprotected: Any = None,
    signed_header: bytes | None = None,
    digest: hashes.HashAlgorithm | None = None,
    tagged: bool = False,
) -> bytes:
    """A COSE_Sign1 message. `signed_header`: what is signed where it is not `protected`."""
    header = protected if signed_header is None else signed_header
    structure = cbor2.dumps(["Signature1", header, b"", payload])
    r, s = decode_dss_signature(key.sign(structure, ec.ECDSA(digest or hashes.SHA384())))
    size = (key.curve.key_size + 7) // 8
    signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
    parts = [protected, {} if unprotected is None else unprotected, payload, signature]
    return cbor2.dumps(cbor2.CBORTag(18, parts) if tagged else parts)


@dataclass
class Module:
    """A security module, its chain from the root down, and what it puts into documents."""

    chain: list[Issued]
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, *, leaf: dict[str, Any] | None = None, issuer: dict[str, Any] | None = None) -> Module:
        """Root, one intermediate and the module's own certificate; `leaf` and `issuer` change what `issue` is told."""
        root = issue("aws.nitro-enclaves", days=(-3650, 3650))
        middle = issue("instance.nitro-enclaves", root, **{"path_length": 0, **(issuer or {})})
        own = issue("enclave", middle, **{"ca": False, "days": (-0.1, 0.1), **(leaf or {})})
        return cls([root, middle, own])

    @property
    def root(self) -> str:
        return fingerprint(self.chain[0].certificate)

    def document(self, **changes: Any) -> dict[str, Any]:
        """`...` leaves a field out."""
        fields = {
            "module_id": "i-0123456789abcdef0-enc0123456789abcdef",
            "digest": "SHA384",
            "timestamp": int(NOW * 1000),
            "pcrs": PCRS,
            "certificate": self.chain[-1].der,
            "cabundle": [item.der for item in self.chain[:-1]],
            "public_key": b"key",
            "user_data": bytes(range(64)),
            "nonce": b"n" * 32,
            **self.fields,
            **changes,
        }
        return {name: value for name, value in fields.items() if value is not ...}

    def evidence(self, encode: Callable[[Any], bytes] = cbor2.dumps, **changes: Any) -> bytes:
        return sign1(encode(self.document(**changes)), self.chain[-1].key)
