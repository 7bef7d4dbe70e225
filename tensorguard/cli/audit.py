"""`tensafe audit`: check an attestor's audit log without the attestor, in its database or in an export."""

from __future__ import annotations

import json
import os
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
from tensorguard.errors import ConfigurationError, TenSafeError
from tensorguard.evidence.keys import MAX_KEY_SET_BYTES, KeySet
from tensorguard.store.audit import records_in_file, records_of, verify_records
from tensorguard.store.audit_head import AuditHead
from tensorguard.store.state import AttestorState

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """Check audit logs."""


@app.command()
def verify(
    log: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Argument(help="Export made by `tensafe audit export`; without it the attestor's database is checked."),
    ] = None,
    keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="JWK set of the attestor (GetKeys); checks the signatures of an export too."),
    ] = None,
    head: Annotated[
        str, typer.Option(help="RECORDS:HASH seen earlier (GetStatus); finds a log cut short since then.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Find any edited, deleted, inserted or reordered record. Exit code 0 when there is none, 3 otherwise."""
    seen = _parse_head(head)
    key_set = None if keys is None else _load_keys(keys)
    try:
        if log is not None:
            result = verify_records(records_in_file(log), key_set, seen=seen)
        else:
            with AttestorState(location(attestor_state, database_url, key, witness)) as state:
                key_set = key_set or state.key_set()
                with state.database.reading() as connection:
                    result = verify_records(records_of(connection), key_set, seen=seen)
    except ConfigurationError:
        raise
    except TenSafeError as error:
        if as_json:
            typer.echo(json.dumps({"verified": False, "reason": error.reason, "message": error.message}))
        raise
    signatures = "checked" if key_set is not None else "not checked (no --keys)"
    if as_json:
        report = {"verified": True, "records": result.records, "head": result.hash, "signatures": signatures}
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{result.records} records, unchanged; signatures {signatures}; head {result.hash}")


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="The file to make, one JSON object a line; must not exist.")],
    keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write the JWK set that verifies the signatures to this new file."),
    ] = None,
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Write the audit log to a file, as it stands in the database. `tensafe audit verify FILE` checks it anywhere."""
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            count = 0
            with os.fdopen(descriptor, "wb") as stream, state.database.reading() as connection:
                for line in records_of(connection):
                    stream.write(line + b"\n")
                    count += 1
            if keys is not None:
                with keys.open("xb") as stream:
                    stream.write(state.key_set().to_jwks())
        except OSError as error:
            raise ConfigurationError(f"cannot write {error.filename or output}: {error.strerror}") from None
    typer.echo(f"{output}: {count} records")


def _load_keys(path: Path) -> KeySet:
    try:
        with path.open("rb") as stream:
            return KeySet.from_jwks(stream.read(MAX_KEY_SET_BYTES + 1))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except TenSafeError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _parse_head(text: str) -> list[AuditHead]:
    if not text:
        return []
    records, _, digest = text.partition(":")
    if not records.isdecimal() or len(digest) != 64:
        raise ConfigurationError("--head must be RECORDS:HASH, for example 12:ab34…")
    return [AuditHead(int(records), digest)]
