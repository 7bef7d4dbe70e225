"""The next form of a package that exists: the same adapter under a new content key, or a new signature."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from tensorguard.crypto.signatures import SigningKeys, VerifyingKeys
from tensorguard.errors import InvalidInputError, PermissionDeniedError
from tensorguard.package.envelope import VerifiedManifest, make_envelope
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.package.names import check_sequence
from tensorguard.package.reader import key_id, open_manifest, open_parts, read_parts
from tensorguard.package.sealing import KeyRegistrar, check_is_new, new_content_key, new_file, publish, seal_parts
from tensorguard.package.writer import DEFAULT_LIFE_SECONDS


def rekey_package(
    path: Path | str,
    output: Path | str,
    verified: VerifiedManifest,
    content_key: bytes,
    *,
    sequence: int,
    signing_keys: SigningKeys,
    key_registrar: KeyRegistrar,
    release_policy: ReleasePolicy | None = None,
    life_seconds: int = DEFAULT_LIFE_SECONDS,
) -> VerifiedManifest:
    """Seal the same weights and basis again, in a new file, under a content key of its own and a higher sequence.

    Contract and token budget stay; the budget begins anew, so that what the adapter serves adds up over sequences.
    `verified` may have expired. `release_policy` is named in the new package; None names none.
    Raises InvalidInputError, PermissionDeniedError (sequence not higher), ConfigurationError (file exists),
    PackageKeyError, PackageTamperedError, and what `publish` raises.
    """
    output, old = Path(output), verified.manifest
    check_sequence(sequence)
    if sequence <= old.sequence:
        raise PermissionDeniedError(f"sequence {sequence} is not above {old.sequence}, that of the package itself")
    if not 1 <= life_seconds <= 2**40:
        raise InvalidInputError("life must be positive")
    check_is_new(output)
    plaintexts = open_parts(path, verified, content_key)
    new_key, created = new_content_key(), int(time.time())
    parts, ciphertexts = seal_parts(new_key, old.tenant, old.package_id, sequence, plaintexts)
    changes = {
        "sequence": sequence,
        "created": created,
        "expires": created + life_seconds,
        "key_id": key_id(new_key),
        "release_policy": release_policy,
        "parts": parts,
    }
    # Not validated here: `publish` parses the finished file.
    return publish(output, old.model_copy(update=changes), ciphertexts, new_key, signing_keys, key_registrar)


def sign_again(
    path: Path | str,
    output: Path | str,
    trusted: VerifyingKeys | Sequence[VerifyingKeys],
    signing_keys: SigningKeys,
) -> VerifiedManifest:
    """The same package in a new file with the signatures of other keys. `trusted`: who may have signed the old one.

    Manifest and parts stay byte for byte, and so do the manifest's digest, what is registered for it, and its leases.
    Raises what `open_manifest` and `verify_parts` raise for the old file, and ConfigurationError for the new one.
    """
    output = Path(output)
    check_is_new(output)
    verified = open_manifest(path, trusted)
    pieces = itertools.chain([make_envelope(verified.manifest, signing_keys)], read_parts(path, verified))
    with new_file(output, pieces) as temporary:
        return open_manifest(temporary, signing_keys.public)
