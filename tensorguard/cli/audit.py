"""`tensafe audit`: check an attestor's audit log without the attestor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tensorguard.errors import ConfigurationError, TenSafeError
from tensorguard.evidence.audit import AuditHead, verify_audit_log
from tensorguard.evidence.keys import MAX_KEY_SET_BYTES, KeySet

app = typer.Typer(help="Check audit logs.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check audit logs."""


@app.command()
def verify(
    log: Annotated[Path, typer.Argument(help="audit.jsonl of an attestor's state directory")],
    keys: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option(help="JWK set of the attestor (GetKeys); checks every signature too"),
    ] = None,
    head: Annotated[
        str, typer.Option(help="RECORDS:HASH seen earlier (GetStatus); finds a log cut short since then")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Find any edited, deleted, inserted or reordered record. Exit code 0 when there is none, 3 otherwise."""
    try:
        result = verify_audit_log(log, _load_keys(keys), expected=_parse_head(head))
    except ConfigurationError as error:
        typer.echo(error.line, err=True)
        raise typer.Exit(2) from None
    except TenSafeError as error:
        if as_json:
            typer.echo(json.dumps({"verified": False, "reason": error.reason, "message": error.message}))
        typer.echo(error.line, err=True)
        raise typer.Exit(3) from None
    signatures = "checked" if keys is not None else "not checked (no --keys)"
    if as_json:
        report = {"verified": True, "records": result.records, "head": result.hash, "signatures": signatures}
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{result.records} records, unchanged; signatures {signatures}; head {result.hash}")


def _load_keys(path: Path | None) -> KeySet | None:
    if path is None:
        return None
    try:
        with path.open("rb") as stream:
            return KeySet.from_jwks(stream.read(MAX_KEY_SET_BYTES + 1))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except TenSafeError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _parse_head(text: str) -> AuditHead | None:
    if not text:
        return None
    records, _, digest = text.partition(":")
    if not records.isdecimal() or len(digest) != 64:
        raise ConfigurationError("--head must be RECORDS:HASH, for example 12:ab34…")
    return AuditHead(int(records), digest)
