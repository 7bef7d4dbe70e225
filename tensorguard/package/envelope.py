"""The bytes before a package's parts: header, manifest, signatures (docs/tssp.md).

    magic "TSSP" | version u16 | flags u16 = 0 | manifest length u32 | signatures length u32 = 3405
    manifest | signer key id, 32 bytes | Ed25519 signature, 64 | ML-DSA-65 signature, 3309

Integers are little-endian. The signatures are over the DSSE pre-authentication encoding of the manifest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from tensorguard.crypto.signatures import (
    ED25519_SIGNATURE_BYTES,
    MLDSA65_SIGNATURE_BYTES,
    DualSignature,
    SigningKeys,
    VerifyingKeys,
)
from tensorguard.errors import PackageError
from tensorguard.package.manifest import MAX_MANIFEST_BYTES, PAYLOAD_TYPE, Manifest, parse_manifest

MAGIC = b"TSSP"
VERSION = 1
KEY_ID_BYTES = 32
SIGNATURES_BYTES = KEY_ID_BYTES + ED25519_SIGNATURE_BYTES + MLDSA65_SIGNATURE_BYTES

_HEADER = struct.Struct("<4sHHII")


@dataclass(frozen=True, slots=True)
class VerifiedManifest:
    """A manifest whose signatures verified under a trusted key."""

    manifest: Manifest
    digest: str
    """SHA-256 of the canonical manifest, hex."""
    signer: str
    """Key id of the signer, hex."""
    envelope: bytes
    """Header, manifest and signatures, as in the file."""


@dataclass(frozen=True, slots=True)
class UnverifiedManifest:
    """A well-formed manifest of unknown origin: to be shown, not to be acted on."""

    manifest: Manifest
    digest: str
    signer: str
    envelope: bytes


def make_envelope(manifest: Manifest, signing_keys: SigningKeys) -> bytes:
    """Sign a manifest and put the envelope together."""
    data = manifest.to_bytes()
    signature = signing_keys.sign(PAYLOAD_TYPE, data)
    key_id = bytes.fromhex(signing_keys.public.key_id)
    header = _HEADER.pack(MAGIC, VERSION, 0, len(data), SIGNATURES_BYTES)
    return header + data + key_id + signature.ed25519 + signature.mldsa65


def read_envelope(stream: BinaryIO) -> bytes:
    """Read the envelope at the beginning of a package. Raises PackageError when it is none or is cut off."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise PackageError("this is not a .tssp package")
    _, version, flags, manifest_bytes, signature_bytes = _HEADER.unpack(header)
    if version != VERSION or flags != 0:
        raise PackageError(f"package format version {version} (flags {flags}) is not known; this is version {VERSION}")
    if not 2 <= manifest_bytes <= MAX_MANIFEST_BYTES or signature_bytes != SIGNATURES_BYTES:
        raise PackageError("the package header is malformed: impossible lengths")
    rest = stream.read(manifest_bytes + SIGNATURES_BYTES)
    if len(rest) != manifest_bytes + SIGNATURES_BYTES:
        raise PackageError("the package is cut off before the end of its signatures")
    return header + rest


def verify_envelope(envelope: bytes, trusted: VerifyingKeys | Sequence[VerifyingKeys]) -> VerifiedManifest:
    """Check both signatures, then parse the manifest.

    Raises PackageError for an unknown signer or malformed bytes, PackageTamperedError when a signature fails.
    """
    manifest, key_id, signature = _split(envelope)
    keys = (trusted,) if isinstance(trusted, VerifyingKeys) else tuple(trusted)
    signer = next((key for key in keys if key.key_id == key_id), None)
    if signer is None:
        known = ", ".join(key.key_id[:16] for key in keys) or "none"
        raise PackageError(
            f"the package is signed by key {key_id[:16]}, which is not trusted here (trusted: {known}): give the "
            "public key file of who packed it, if you trust them"
        )
    signer.verify(PAYLOAD_TYPE, manifest, signature)
    return VerifiedManifest(parse_manifest(manifest), hashlib.sha256(manifest).hexdigest(), key_id, envelope)


def parse_envelope(envelope: bytes) -> UnverifiedManifest:
    """Parse without checking any signature, for display."""
    manifest, key_id, _ = _split(envelope)
    return UnverifiedManifest(parse_manifest(manifest), hashlib.sha256(manifest).hexdigest(), key_id, envelope)


def _split(envelope: bytes) -> tuple[bytes, str, DualSignature]:
    if len(envelope) < _HEADER.size + SIGNATURES_BYTES:
        raise PackageError("the package is cut off before the end of its signatures")
    magic, version, flags, manifest_bytes, signature_bytes = _HEADER.unpack_from(envelope)
    if (magic, version, flags, signature_bytes) != (MAGIC, VERSION, 0, SIGNATURES_BYTES):
        raise PackageError("this is not the envelope of a version 1 .tssp package")
    if manifest_bytes > MAX_MANIFEST_BYTES or len(envelope) != _HEADER.size + manifest_bytes + SIGNATURES_BYTES:
        raise PackageError("the package header is malformed: impossible lengths")
    manifest, signatures = envelope[_HEADER.size : -SIGNATURES_BYTES], envelope[-SIGNATURES_BYTES:]
    key_id, rest = signatures[:KEY_ID_BYTES], signatures[KEY_ID_BYTES:]
    return (
        manifest,
        key_id.hex(),
        DualSignature(ed25519=rest[:ED25519_SIGNATURE_BYTES], mldsa65=rest[ED25519_SIGNATURE_BYTES:]),
    )
