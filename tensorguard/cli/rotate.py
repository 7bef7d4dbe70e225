"""`tensafe rotate`: the same package, signed by a new publisher key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from tensorguard.errors import InvalidInputError
from tensorguard.package.publishers import forget_publisher, remember_publisher
from tensorguard.package.renewal import sign_again
from tensorguard.store.state import AttestorState

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def rotate(
    file: Annotated[Path, typer.Argument(help="The package that is to have new signatures.")],
    output: Annotated[Path, typer.Option(help="The package to make; must not exist.")],
    public_key: Annotated[Path, typer.Option(help="Public key file of who signed it; the key to be replaced.")],
    signing_key: Annotated[Path, typer.Option(help="Private key file of the new key (`tensafe keys generate`).")],
    retire: Annotated[
        bool, typer.Option("--retire", help="Trust the old key no longer here; do so with the last package it signed.")
    ] = False,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Replace the key that signs packages, package by package.

    Manifest, content key, sequence and leases stay as they are. Whoever verifies packages needs the new public key
    file, and must drop the old one to stop trusting it.
    """
    old, new = VerifyingKeys.read(public_key), SigningKeys.read(signing_key)
    if old.key_id == new.public.key_id:
        raise InvalidInputError("this is the key that signed the package; make a new one with `tensafe keys generate`")
    verified = sign_again(file, output, old, new)
    manifest = verified.manifest
    fields = {
        "tenant": manifest.tenant,
        "package_id": manifest.package_id,
        "sequence": manifest.sequence,
        "manifest_digest": verified.digest,
        "old_signer": old.key_id,
        "new_signer": new.public.key_id,
        "retired": retire,
    }
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        state.audit.append("rotate_signing_key", fields)
        remember_publisher(state.directory, new.public)
        if retire:
            forget_publisher(state.directory, old)
    typer.echo(
        f"{output}: {manifest.tenant}/{manifest.package_id} sequence {manifest.sequence}, signed by "
        f"{new.public.key_id[:16]} instead of {old.key_id[:16]}\nmanifest {verified.digest}, as before"
    )
