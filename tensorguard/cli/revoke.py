"""`tensafe revoke`: take back what was allowed. Attestors enforce it at once, holders within seconds."""

from __future__ import annotations

import time
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
from tensorguard.errors import InvalidInputError
from tensorguard.store.revocations import RevocationKind, Subject
from tensorguard.store.revocations import revoke as put_on_record
from tensorguard.store.state import AttestorState

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def revoke(
    kind: Annotated[RevocationKind, typer.Argument(help="What is revoked.")],
    subject: Annotated[
        str,
        typer.Argument(
            help="TENANT/PACKAGE, TENANT/PACKAGE@SEQUENCE, key id, workload thumbprint, measurement or chip id."
        ),
    ],
    note: Annotated[str, typer.Option(help="Why; goes into the audit log.")] = "",
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
) -> None:
    """Revoke a package, a version of it, a content key, a workload, a measurement or a chip. There is no way back."""
    parsed = parse_subject(kind, subject)
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        fields = {"kind": kind.value, "subject": subject[:200], "note": note[:200]}
        with state.audit.recording("revoke", fields) as connection:
            revocation = put_on_record(connection, parsed, note, int(time.time()))
    typer.echo(f"revocation {revocation.number}: {kind.value} {subject}")


def parse_subject(kind: RevocationKind, text: str) -> Subject:
    """A subject as it is written on the command line. Raises InvalidInputError."""
    if kind not in (RevocationKind.PACKAGE, RevocationKind.VERSION):
        subject = Subject(kind, value=text)
    else:
        name, _, sequence = text.partition("@")
        tenant, _, package_id = name.partition("/")
        if (kind is RevocationKind.VERSION) != sequence.isdecimal() or len(sequence) > 16:
            raise InvalidInputError("a package is written TENANT/PACKAGE, a version TENANT/PACKAGE@SEQUENCE")
        subject = Subject(kind, tenant, package_id, int(sequence or 0))
    subject.validate()
    return subject
