"""Sealing: encrypted parts, and a signed file that is read back before its key is registered and it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tensorguard.crypto.aead import KEY_BYTES, seal_part
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError
from tensorguard.package.envelope import VerifiedManifest, make_envelope
from tensorguard.package.manifest import Manifest, Part, PartRole
from tensorguard.package.parts import part_context
from tensorguard.package.reader import key_id, open_manifest, read_adapter


class KeyRegistrar(Protocol):
    """Hands a content key to the attestor that will release it (`PackageKeyRegistry.register`).

    Must raise when it cannot, or when the sequence is taken or too old.
    """

    def __call__(
        self,
        *,
        manifest_digest: str,
        tenant: str,
        package_id: str,
        sequence: int,
        key_id: str,
        content_key: bytes,
        token_budget: int,
        expires: int,
        release_policy_sha256: str,
    ) -> object: ...


def new_content_key() -> bytes:
    """32 random bytes, for one sequence of one package."""
    return os.urandom(KEY_BYTES)


def seal_parts(
    content_key: bytes, tenant: str, package_id: str, sequence: int, plaintexts: Mapping[PartRole, bytes]
) -> tuple[tuple[Part, ...], list[bytes]]:
    """Encrypt parts in the order given; what a manifest says about them, and the ciphertexts."""
    parts, ciphertexts, offset = [], [], 0
    for role, plaintext in plaintexts.items():
        context = part_context(tenant, package_id, sequence, key_id(content_key), role, role)
        ciphertext = seal_part(content_key, context, plaintext)
        digest = hashlib.sha256(ciphertext).hexdigest()
        parts.append(Part(name=role, role=role, offset=offset, size=len(ciphertext), sha256=digest))
        ciphertexts.append(ciphertext)
        offset += len(ciphertext)
    return tuple(parts), ciphertexts


def publish(
    output: Path,
    manifest: Manifest,
    ciphertexts: Sequence[bytes],
    content_key: bytes,
    signing_keys: SigningKeys,
    key_registrar: KeyRegistrar,
) -> VerifiedManifest:
    """Sign, write, read back and open the finished file, register its key, and only then name it `output`.

    Raises ConfigurationError when the file exists or cannot be written, what `read_adapter` raises for content that
    breaks its own contract, and whatever `key_registrar` raises; there is no file then.
    """
    with new_file(output, [make_envelope(manifest, signing_keys), *ciphertexts]) as temporary:
        verified = open_manifest(temporary, signing_keys.public)
        read_adapter(temporary, verified, content_key, privacy_bound_log2=manifest.moai.privacy_bound_log2)
        policy = manifest.release_policy
        key_registrar(
            manifest_digest=verified.digest,
            tenant=manifest.tenant,
            package_id=manifest.package_id,
            sequence=manifest.sequence,
            key_id=manifest.key_id,
            content_key=content_key,
            token_budget=manifest.token_budget,
            expires=manifest.expires,
            release_policy_sha256="" if policy is None else policy.sha256,
        )
    return verified


def check_is_new(output: Path) -> None:
    """Raise ConfigurationError when `output` exists, before work is done for it."""
    if output.exists():
        raise ConfigurationError(f"{output} exists already; it is not overwritten")


@contextlib.contextmanager
def new_file(path: Path, pieces: Iterable[bytes]) -> Iterator[Path]:
    """A temporary file beside `path`, which becomes `path` when the block succeeds and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as stream:
                stream.writelines(pieces)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
        yield temporary
        try:
            os.link(temporary, path)
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
