"""`tensafe rekey`: the same adapter under a new content key and the next sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tensorguard.cli.state_options import (
    DEFAULT_STATE,
    DatabaseUrl,
    KeyName,
    StateDirectory,
    Witnesses,
    location,
)
from tensorguard.crypto.signatures import SigningKeys, VerifyingKeys
from tensorguard.errors import PermissionDeniedError
from tensorguard.evidence.policy import load_policy
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.package.publishers import remember_publisher
from tensorguard.package.reader import open_manifest
from tensorguard.package.renewal import rekey_package
from tensorguard.store.state import AttestorState

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def rekey(
    file: Annotated[Path, typer.Argument(help="The package whose adapter is sealed again; it may have expired.")],
    output: Annotated[Path, typer.Option(help="The package to make; must not exist.")],
    signing_key: Annotated[Path, typer.Option(help="Private key file that signs the new package.")],
    public_key: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option(help="Public key file of who signed the old package; default: the signing key's own."),
    ] = None,
    sequence: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Sequence of the new package; default: the one after the newest."),
    ] = None,
    expires_days: Annotated[int, typer.Option(min=1, max=36500, help="Days until the new package expires.")] = 365,
    policy: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Attestor policy to name as release policy; default: the one the old package names."),
    ] = None,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Seal a package's adapter again under a new content key and a higher sequence, and register that key.

    Needs neither adapter nor base model. The token budget begins anew. The old sequence gets no new leases; what is
    served under it goes on until `tensafe revoke version` or its own expiry.
    """
    keys = SigningKeys.read(signing_key)
    verified = open_manifest(file, keys.public if public_key is None else VerifyingKeys.read(public_key))
    old = verified.manifest
    release_policy = old.release_policy
    if policy is not None:
        loaded = load_policy(policy)
        release_policy = ReleasePolicy(id=loaded.id, sha256=loaded.sha256)
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        content_key = state.packages.lookup(old.tenant, old.package_id, old.sequence, verified.digest).content_key
        newest = max(old.sequence, state.packages.newest_sequence(old.tenant, old.package_id) or 0)
        if sequence is not None and sequence <= newest:
            raise PermissionDeniedError(
                f"sequence {sequence} of {old.tenant}/{old.package_id} is not above {newest}, the newest one registered"
            )
        made = rekey_package(
            file,
            output,
            verified,
            content_key,
            sequence=newest + 1 if sequence is None else sequence,
            signing_keys=keys,
            key_registrar=state.packages.register,
            release_policy=release_policy,
            life_seconds=expires_days * 24 * 3600,
        )
        remember_publisher(state.directory, keys.public)
    name = f"{old.tenant}/{old.package_id}"
    typer.echo(
        f"{output}: {name} sequence {made.manifest.sequence}, content key {made.manifest.key_id}\n"
        f"manifest {made.digest}\n"
        f"to end what is served under the old key: tensafe revoke version {name}@{old.sequence}"
    )
