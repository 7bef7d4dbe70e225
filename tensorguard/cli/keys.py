"""`tensafe keys`: signing keys of packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError

PRIVATE_NAME = "tssp-signing-key.pem"
PUBLIC_NAME = "tssp-signing-key.pub.pem"

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _keys() -> None:
    """Signing keys of packages: Ed25519 and ML-DSA-65 in one file."""


@app.command("generate")
def generate(
    output: Annotated[Path, typer.Option(help="Directory for the two files; made when absent.")],
) -> None:
    """Make a key pair that signs packages. Existing files are not overwritten."""
    private, public = output / PRIVATE_NAME, output / PUBLIC_NAME
    try:
        output.mkdir(mode=0o700, parents=True, exist_ok=True)
        keys = SigningKeys.generate()
        if public.exists():
            raise ConfigurationError(f"{public} exists already; it is not overwritten")
        keys.write(private)
        public.write_bytes(keys.public.to_pem())
    except OSError as error:
        raise ConfigurationError(f"cannot write to {output}: {error.strerror or error}") from None
    typer.echo(f"{private}  keep this secret; it signs packages")
    typer.echo(f"{public}  give this to whoever verifies them")
    typer.echo(f"key id {keys.public.key_id}")
