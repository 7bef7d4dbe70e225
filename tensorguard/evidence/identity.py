"""A workload's identity: an ECDSA P-256 key that signs and an MLKEM768-X25519 key that opens HPKE.

Made when the process starts, attested, and gone with the process: private keys are never written anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.crypto import canonical, hpke
from tensorguard.errors import AuthenticationError, InvalidInputError

SIGNING_KEY_BYTES = 65
MAX_SIGNATURE_BYTES = 72


def jwk_of(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The public JWK (RFC 7518, section 6.2) of a P-256 key: kty, crv, x, y."""
    numbers = key.public_numbers()
    return {
        "crv": "P-256",
        "kty": "EC",
        "x": _base64url(numbers.x.to_bytes(32, "big")),
        "y": _base64url(numbers.y.to_bytes(32, "big")),
    }


def thumbprint(key: ec.EllipticCurvePublicKey) -> str:
    """RFC 7638 thumbprint: SHA-256 over the JWK's required members, base64url."""
    return _base64url(hashlib.sha256(canonical.dumps(jwk_of(key))).digest())


def load_signing_key(point: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 public key of an uncompressed SEC1 point. Raises InvalidInputError for anything else."""
    if len(point) != SIGNING_KEY_BYTES or point[0] != 4:
        raise InvalidInputError("the signing key must be an uncompressed P-256 point of 65 bytes")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError:
        raise InvalidInputError("the signing key is not a point on P-256") from None


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """The public keys of a workload, as bytes; checked where they are used and by `validate`."""

    signing_key: bytes
    """Uncompressed SEC1 point, 65 bytes."""
    hpke_key: bytes
    """ML-KEM-768 encapsulation key (1184 bytes) followed by the X25519 key (32 bytes), or the latter alone."""

    def validate(self) -> None:
        """Raises InvalidInputError unless both keys are well-formed."""
        load_signing_key(self.signing_key)
        self.seal(b"", b"")  # only a valid key can be sealed to

    @property
    def hpke_suite(self) -> hpke.HpkeSuite:
        """What is sealed to this identity with. Raises InvalidInputError when the key is for none."""
        return hpke.suite_of(self.hpke_key)

    @property
    def signing_key_spki(self) -> bytes:
        """The signing key as a DER SubjectPublicKeyInfo, 91 bytes. Raises InvalidInputError when it is no key."""
        return load_signing_key(self.signing_key).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def thumbprint(self) -> str:
        """RFC 7638 thumbprint of the signing key: the name of this identity."""
        return thumbprint(load_signing_key(self.signing_key))

    @property
    def jwk(self) -> dict[str, str]:
        """The signing key as a JWK."""
        return jwk_of(load_signing_key(self.signing_key))

    def verify(self, signature: bytes, transcript: bytes) -> None:
        """Raises AuthenticationError unless `signature` (DER) is this identity's over `transcript`."""
        if len(signature) > MAX_SIGNATURE_BYTES:
            raise AuthenticationError("the signature is too long for ECDSA P-256")
        try:
            load_signing_key(self.signing_key).verify(signature, transcript, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise AuthenticationError(
                "the signature is not the attested key's over this request; sign with the key the token names"
            ) from None

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        """HPKE ciphertext that only this identity opens, with the same `info`."""
        return hpke.seal(self.hpke_key, info, plaintext)


class WorkloadIdentity:
    """The key pairs of a running workload. Shows nothing of the private keys and cannot be pickled."""

    __slots__ = ("_recipient", "_signing", "public")

    def __init__(self, signing: ec.EllipticCurvePrivateKey, recipient: hpke.HpkePrivateKey) -> None:
        self._signing = signing
        self._recipient = recipient
        self.public = PublicIdentity(
            signing.public_key().public_bytes(
                serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            ),
            recipient.public_bytes,
        )

    @classmethod
    def generate(cls) -> WorkloadIdentity:
        """New random key pairs."""
        return cls(ec.generate_private_key(ec.SECP256R1()), hpke.HpkePrivateKey.generate())

    def sign(self, transcript: bytes) -> bytes:
        """ECDSA P-256 with SHA-256 over `transcript`, DER."""
        return self._signing.sign(transcript, ec.ECDSA(hashes.SHA256()))

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open what was sealed to this identity under `info`.

        Raises AuthenticationError when it was sealed to another key, under other terms, or was changed.
        """
        try:
            return self._recipient.open(info, sealed)
        except InvalidInputError:
            raise AuthenticationError(
                "what was sealed does not open: it is for another key or under other terms than were answered"
            ) from None

    def __repr__(self) -> str:
        return f"WorkloadIdentity({self.public.thumbprint})"

    def __reduce__(self) -> str:
        raise TypeError("a workload identity stays in its process")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
