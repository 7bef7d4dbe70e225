"""Opening packages. Nothing of a part is used before its hash, its last chunk and its content are checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tensorguard.ckks.weights import GroupWeights
from tensorguard.crypto.aead import derive_key, open_part
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import InvalidInputError, PackageError, PackageKeyError, PackageTamperedError
from tensorguard.lora.groups import Int32Array
from tensorguard.package.contract import DEFAULT_PRIVACY_BOUND_LOG2, check_contract, check_weights
from tensorguard.package.envelope import (
    VerifiedManifest,
    read_envelope,
    verify_envelope,
)
from tensorguard.package.inspection import check_size, open_package
from tensorguard.package.manifest import Group, Manifest, Part, PartRole
from tensorguard.package.parts import context_of, decode_basis, decode_weights


@dataclass(frozen=True, slots=True, eq=False)
class GroupContents:
    """One group: its public description and its secret weights."""

    info: Group
    weights: GroupWeights = field(repr=False)

    @property
    def integers(self) -> Int32Array:
        """int32 [rows, d_in]"""
        return self.weights.integers


@dataclass(frozen=True, slots=True, eq=False)
class AdapterContents:
    """An opened package."""

    groups: tuple[GroupContents, ...]
    u: bytes = field(repr=False)
    """The basis part as safetensors, for the attested inference host (`parts.decode_basis`). Empty in full mode."""


def open_manifest(path: Path | str, verify_keys: VerifyingKeys | Sequence[VerifyingKeys]) -> VerifiedManifest:
    """Check a package's signatures, structure and contract. Needs no secret.

    Raises PackageError (unknown signer, malformed, contract broken), PackageTamperedError (signature, or the
    file does not end where the manifest says) or PrivacyBoundError.
    """
    with open_package(path) as stream, _named(path):
        verified = verify_envelope(read_envelope(stream), verify_keys)
        check_size(stream, verified.envelope, verified.manifest)
        check_contract(verified.manifest)
    return verified


def verify_parts(path: Path | str, verified: VerifiedManifest) -> None:
    """Check the hashes of all parts, without the content key. Raises PackageTamperedError."""
    for _ in read_parts(path, verified):
        pass


def read_parts(path: Path | str, verified: VerifiedManifest) -> Iterator[bytes]:
    """The ciphertext of each part whose hash is the manifest's. Raises PackageTamperedError."""
    with open_package(path) as stream, _named(path):
        _seek_parts(stream, verified)
        for part in verified.manifest.parts:
            yield _read_part(stream, part)


def read_adapter(
    path: Path | str,
    verified: VerifiedManifest,
    content_key: bytes,
    *,
    privacy_bound_log2: int = DEFAULT_PRIVACY_BOUND_LOG2,
    now: float | None = None,
) -> AdapterContents:
    """Decrypt a package whose manifest has been verified.

    Raises PackageKeyError when the key is not this package's, PackageTamperedError when a part was changed,
    PackageError when the package has expired or its content is not what the manifest announces, and
    PrivacyBoundError when its weights do not keep the bounds (the package's own and `privacy_bound_log2`).
    """
    manifest = verified.manifest
    if (time.time() if now is None else now) >= manifest.expires:
        raise PackageError(f"package {manifest.tenant}/{manifest.package_id} has expired; pack a new sequence")
    parameters = check_contract(manifest, privacy_bound_log2)
    plain = open_parts(path, verified, content_key)
    integers = decode_weights(manifest, plain["weights"])
    basis = plain.get("basis", b"")
    decode_basis(manifest, basis)
    try:
        weights = tuple(
            GroupWeights(values, group.scale_exponents, group.norm_bound)
            for group, values in zip(manifest.moai.groups, integers, strict=True)
        )
    except InvalidInputError as error:
        raise PackageError(f"the weights break the package's contract: {error}") from None
    check_weights(manifest, parameters, weights, privacy_bound_log2)
    return AdapterContents(
        groups=tuple(GroupContents(group, member) for group, member in zip(manifest.moai.groups, weights, strict=True)),
        u=basis,
    )


def open_parts(path: Path | str, verified: VerifiedManifest, content_key: bytes) -> dict[PartRole, bytes]:
    """The plaintext of each part, whole: decrypted to its last chunk, under a key and a hash that are the manifest's.

    What is in them is not checked (`read_adapter`). Raises PackageKeyError or PackageTamperedError.
    """
    manifest = verified.manifest
    if key_id(content_key) != manifest.key_id:
        raise PackageKeyError(
            f"this is not the content key of {manifest.tenant}/{manifest.package_id} sequence {manifest.sequence}: ask "
            "the attestor that the package was registered with, or pack the adapter again under a new sequence"
        )
    plaintexts: dict[PartRole, bytes] = {}
    for part, data in zip(manifest.parts, read_parts(path, verified), strict=True):
        with _named(path):
            plaintexts[part.role] = _decrypt(content_key, manifest, part, data)
    return plaintexts


def key_id(content_key: bytes) -> str:
    """The public name of a content key: 16 bytes, hex, derived from it by HKDF-SHA256."""
    return derive_key(content_key, b"tssp/v1/key-id")[:16].hex()


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Name the file in errors about its content: a coprocessor is given several."""
    try:
        yield
    except PackageTamperedError as error:
        raise PackageTamperedError(f"{path}: {error}; get the file again from who packed it") from None
    except PackageError as error:
        raise type(error)(f"{path}: {error}") from None


def _seek_parts(stream: BinaryIO, verified: VerifiedManifest) -> None:
    # The file may have been exchanged since its manifest was verified.
    if stream.read(len(verified.envelope)) != verified.envelope:
        raise PackageTamperedError("the package is not the one whose manifest was verified")
    check_size(stream, verified.envelope, verified.manifest)


def _read_part(stream: BinaryIO, part: Part) -> bytes:
    data = stream.read(part.size)
    if len(data) != part.size or hashlib.sha256(data).hexdigest() != part.sha256:
        raise PackageTamperedError(f"part {part.name} was changed: its hash is not the one in the manifest")
    return data


def _decrypt(content_key: bytes, manifest: Manifest, part: Part, data: bytes) -> bytes:
    try:
        return open_part(content_key, context_of(manifest, part), data)
    except InvalidInputError:
        raise PackageTamperedError(f"part {part.name} does not open: it was not sealed for this package") from None
