"""`tensafe attestor`: look after an attestor's state."""

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
from tensorguard.rpc.certificates import ServiceName
from tensorguard.store.backup import back_up
from tensorguard.store.backup import restore as restore_backup
from tensorguard.store.state import AttestorState

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _attestor() -> None:
    """Look after an attestor's state: its thumbprint, backups, keys, certificates, a database that was set back."""


@app.command()
def thumbprint(
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Print the thumbprint of the key that signs tokens: what workloads pin, so that nobody else can answer them."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        typer.echo(state.key.thumbprint)


@app.command()
def backup(
    output: Annotated[Path, typer.Option(help="The file to make; must not exist.")],
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Copy the database while the attestor runs. The key-encryption key is not in it: keep that elsewhere."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        records = back_up(state, output)
    typer.echo(f"{output}: the state up to audit record {records}; it opens only with the key-encryption key")


@app.command()
def restore(
    backup: Annotated[Path, typer.Option(help="A file made by `tensafe attestor backup`.")],
    attestor_state: StateDirectory = DEFAULT_STATE,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Put a backup where there is no database. Refused as set back unless it is the newest state."""
    directory = attestor_state.expanduser()
    path = restore_backup(backup, directory)
    with AttestorState(location(directory, None, key, witness)) as state:
        typer.echo(f"{path}: restored, at audit record {state.audit.head.records}")


@app.command("rotate-kek")
def rotate_kek(
    new: Annotated[str, typer.Option(help="The new key: file:PATH (made if absent), env:NAME or vault:https://...")],
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Wrap every secret under another key-encryption key. Restart attestors with the new one afterwards."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        count = state.rotate_key_encryption_key(new)
    typer.echo(
        f"{count} secrets are wrapped under the new key: set TENSAFE_ATTESTOR_KEY_ENCRYPTION_KEY={new} and restart "
        "every attestor; backups made before still need the old key"
    )


@app.command("rotate-signing-key")
def rotate_signing_key(
    overlap_hours: Annotated[float, typer.Option(help="How long the new key is known before it signs.", min=0)] = 24.0,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Announce a new signing key. Attestors that run take it by themselves; who pins the key must be told in time."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        old = state.keys.current.thumbprint
        new = state.rotate_signing_key(int(overlap_hours * 3600)).thumbprint
    typer.echo(
        f"{new}: signs in {overlap_hours:g} hours; until then add it wherever attestor_thumbprint is set: {old},{new}"
    )


@app.command()
def authority(
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option(help="The file to write; default: standard output."),
    ] = None,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Show the certificate by which services know each other in TLS: give it to each as attestor_authority.

    In a rotation there are two.
    """
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        pem = state.authorities.pem
    if output is None:
        typer.echo(pem.decode(), nl=False)
    else:
        output.write_bytes(pem)


@app.command("rotate-authority")
def rotate_authority(
    overlap_hours: Annotated[float, typer.Option(help="How long the new one is known before it issues.", min=0)] = 24.0,
    retire_hours: Annotated[
        float, typer.Option(help="How long the old one is trusted after that; its certificates live up to 24.", min=0)
    ] = 25.0,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Announce a new authority of services' certificates. Attestors that run take it by themselves; every service must
    be given the new file of `tensafe attestor authority` before it issues, and once more when the old one has retired.
    """
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        made = state.rotate_authority(int(overlap_hours * 3600), int(retire_hours * 3600))
    typer.echo(
        f"{made.fingerprint}: issues in {overlap_hours:g} hours, and is trusted alone {retire_hours:g} hours later; "
        "replace every attestor_authority file by the output of tensafe attestor authority now, and again then"
    )


@app.command()
def enrol(
    role: Annotated[str, typer.Option(help="What the service is: gateway.")] = "gateway",
    hours: Annotated[float, typer.Option(help="How long the secret can be used.", min=0.01, max=168)] = 1.0,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Vouch for a service that is not attested: prints a secret that gets it one certificate, once."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        secret = state.enrol(ServiceName(role), int(hours * 3600))
    typer.echo(secret)


@app.command("accept-rollback")
def accept_rollback(
    why: Annotated[str, typer.Option(help="Why this state is accepted; goes into the audit log.")],
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Accept a database that was set back, or a new head file or witness. This is an audit record itself.

    Tokens granted and revocations since the backup are forgotten: revoke again what was revoked, before the attestor
    starts.
    """
    state = AttestorState(location(attestor_state, database_url, key, witness), accept_rollback=why)
    with state:
        typer.echo(f"accepted, with audit record {state.audit.head.records}")
