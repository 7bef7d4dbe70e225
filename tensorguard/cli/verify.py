"""`tensafe verify`: everything about a package that can be checked without its content key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import PackageError
from tensorguard.package.reader import open_manifest, verify_parts

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The .tssp package.")],
    public_key: Annotated[Path, typer.Option(help="Public key file of the signer you trust.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Check both signatures, the zero-rotation contract, the expiry and the hashes of all parts.

    Exit code 3 when anything is refused.
    """
    verified = open_manifest(file, VerifyingKeys.read(public_key))
    verify_parts(file, verified)
    manifest = verified.manifest
    if time.time() >= manifest.expires:
        raise PackageError(f"package {manifest.tenant}/{manifest.package_id} has expired; pack a new sequence")
    if as_json:
        result = {
            "verified": True,
            "tenant": manifest.tenant,
            "package_id": manifest.package_id,
            "sequence": manifest.sequence,
            "digest": verified.digest,
            "signer": verified.signer,
            "rotations": manifest.moai.rotations,
            "evaluation_keys": manifest.moai.evaluation_keys,
        }
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            f"{manifest.tenant}/{manifest.package_id} sequence {manifest.sequence}: Ed25519 and ML-DSA-65 "
            f"signatures by {verified.signer[:16]}, part hashes and zero-rotation contract verified\n"
            f"manifest {verified.digest}"
        )
