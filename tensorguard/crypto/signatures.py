"""Dual signatures: Ed25519 (RFC 8032) and ML-DSA-65 (FIPS 204) over a DSSE pre-authentication encoding.

Both must verify, so a forger has to break both. Keys are PEM files that hold both halves, PKCS #8 for the
private and SubjectPublicKeyInfo for the public ones.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from tensorguard.crypto.files import MAX_KEY_FILE_BYTES, read_secret_file, write_secret_file
from tensorguard.errors import ConfigurationError, PackageTamperedError

ED25519_SIGNATURE_BYTES = 64
MLDSA65_SIGNATURE_BYTES = 3309

_PEM_BLOCK = re.compile(rb"-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]+-----\n?")


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1 PAE: what is signed in place of the payload, so that its type is bound."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True)
class DualSignature:
    """Both signatures over one payload."""

    ed25519: bytes
    mldsa65: bytes


@dataclass(frozen=True, slots=True)
class VerifyingKeys:
    """The public half of a signer."""

    ed25519: Ed25519PublicKey
    mldsa65: MLDSA65PublicKey

    @property
    def key_id(self) -> str:
        """SHA-256, hex, of the raw Ed25519 key followed by the raw ML-DSA-65 key. Public."""
        raw = self.ed25519.public_bytes_raw() + self.mldsa65.public_bytes_raw()
        return hashlib.sha256(raw).hexdigest()

    def verify(self, payload_type: str, payload: bytes, signature: DualSignature) -> None:
        """Raise PackageTamperedError unless both signatures are this signer's over exactly this payload."""
        message = pre_authentication_encoding(payload_type, payload)
        try:
            self.ed25519.verify(signature.ed25519, message)
            self.mldsa65.verify(signature.mldsa65, message)
        except InvalidSignature:
            raise PackageTamperedError(
                "the signatures do not verify: the content was changed or another key signed it"
            ) from None

    def to_pem(self) -> bytes:
        """Both keys as SubjectPublicKeyInfo PEM blocks."""
        return b"".join(
            key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in (self.ed25519, self.mldsa65)
        )

    @classmethod
    def from_pem(cls, data: bytes, source: str = "the public key") -> VerifyingKeys:
        """The inverse of `to_pem`. Raises ConfigurationError naming `source` for anything else."""
        first, second = _split(data, source)
        try:
            ed25519, mldsa65 = load_pem_public_key(first), load_pem_public_key(second)
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigurationError(f"{source} does not hold public keys in PEM form") from None
        if not isinstance(ed25519, Ed25519PublicKey) or not isinstance(mldsa65, MLDSA65PublicKey):
            raise ConfigurationError(f"{source} must hold an Ed25519 and then an ML-DSA-65 public key")
        return cls(ed25519, mldsa65)

    @classmethod
    def read(cls, path: Path) -> VerifyingKeys:
        """Read a public key file. Raises ConfigurationError when it cannot be used."""
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_KEY_FILE_BYTES)
        except OSError as error:
            raise ConfigurationError(f"cannot read public key {path}: {error.strerror or error}") from None
        return cls.from_pem(data, str(path))


@dataclass(frozen=True, slots=True, repr=False)
class SigningKeys:
    """The private half of a signer."""

    ed25519: Ed25519PrivateKey
    mldsa65: MLDSA65PrivateKey

    @classmethod
    def generate(cls) -> SigningKeys:
        """A fresh signer."""
        return cls(Ed25519PrivateKey.generate(), MLDSA65PrivateKey.generate())

    @property
    def public(self) -> VerifyingKeys:
        """What others need to verify."""
        return VerifyingKeys(self.ed25519.public_key(), self.mldsa65.public_key())

    def sign(self, payload_type: str, payload: bytes) -> DualSignature:
        """Sign a payload of a declared type with both keys."""
        message = pre_authentication_encoding(payload_type, payload)
        return DualSignature(self.ed25519.sign(message), self.mldsa65.sign(message))

    def write(self, path: Path) -> None:
        """Create a private key file (mode 0600). Raises ConfigurationError when the name is taken."""
        write_secret_file(
            path,
            b"".join(
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                for key in (self.ed25519, self.mldsa65)
            ),
        )

    @classmethod
    def read(cls, path: Path) -> SigningKeys:
        """Read a private key file. Raises ConfigurationError when it cannot be used or others can read it."""
        first, second = _split(read_secret_file(path), str(path))
        try:
            ed25519 = load_pem_private_key(first, password=None)
            mldsa65 = load_pem_private_key(second, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigurationError(f"{path} does not hold private keys in PEM form") from None
        if not isinstance(ed25519, Ed25519PrivateKey) or not isinstance(mldsa65, MLDSA65PrivateKey):
            raise ConfigurationError(
                f"{path} must hold an Ed25519 and then an ML-DSA-65 private key; see tensafe keys generate"
            )
        return cls(ed25519, mldsa65)


def _split(data: bytes, source: str) -> tuple[bytes, bytes]:
    blocks = _PEM_BLOCK.findall(data)
    if len(blocks) != 2 or b"".join(blocks) != data:
        raise ConfigurationError(f"{source} must hold exactly two PEM blocks, as `tensafe keys generate` writes")
    return blocks[0], blocks[1]
