"""`tensafe attest`: collect evidence on this machine and show it."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Annotated, Optional

import typer

from tensorguard.cli import evidence_options as options
from tensorguard.cli.appraisal import parse_hex
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.platforms import platform_of, this_platform
from tensorguard.evidence.report_data import Binding

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
REPORT_DATA_BYTES = 64


@app.command()
def attest(
    kind: Annotated[
        Optional[EvidenceKind],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option(help="Kind to collect; default what this machine is."),
    ] = None,
    nonce: options.Nonce = "",
    report_data: options.ReportData = "",
    role: Annotated[Role, typer.Option(help="Role that evidence which names one names.")] = Role.COPROCESSOR,
    simulated_root_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Private key file of the root that signs simulated evidence."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the files `evidence` and `endorsement-N`; must not exist."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Collect evidence over report data of your choice and show it, unverified (`tensafe evidence verify` verifies).

    The report data are --report-data (64 bytes), or --nonce filled up with zeros, or 64 random bytes. A workload's own
    evidence binds its keys as well and goes to the attestor; this is for policies and for finding out what is wrong.
    """
    if kind is not None:
        platform = platform_of(kind, simulated_root_key=simulated_root_key)
    else:
        platform = this_platform(simulated_root_key=simulated_root_key)
    data = _report_data(nonce, report_data)
    collected = platform.collect(_binding(data, nonce), role)
    files = _write(output, collected) if output is not None else []
    shown = {
        "kind": platform.kind.value,
        "verified": False,
        "report_data": data.hex(),
        "evidence": collected.evidence.hex(),
        "evidence_sha256": hashlib.sha256(collected.evidence).hexdigest(),
        "endorsements": [item.hex() for item in collected.endorsements],
        "files": [str(path) for path in files],
    }
    if as_json:
        typer.echo(json.dumps(shown))
        return
    typer.echo(f"{shown['kind']} evidence of {len(collected.evidence)} bytes, not verified")
    typer.echo(f"report data {shown['report_data']}")
    typer.echo(f"SHA-256 {shown['evidence_sha256']}")
    typer.echo(f"endorsements {len(collected.endorsements)}")
    if not files:
        typer.echo(shown["evidence"])
    for path in files:
        typer.echo(f"wrote {path}")


def _report_data(nonce: str, report_data: str) -> bytes:
    if nonce and report_data:
        raise ConfigurationError("give --nonce or --report-data, not both")
    if report_data:
        data = parse_hex("--report-data", report_data, REPORT_DATA_BYTES)
        if len(data) != REPORT_DATA_BYTES:
            raise ConfigurationError(f"--report-data has {REPORT_DATA_BYTES} bytes; --nonce may have fewer")
        return data
    if nonce:
        return parse_hex("--nonce", nonce, REPORT_DATA_BYTES).ljust(REPORT_DATA_BYTES, b"\0")
    return secrets.token_bytes(REPORT_DATA_BYTES)


def _binding(data: bytes, nonce: str) -> Binding:
    """Nobody holds a key here, so that evidence with a field for one leaves it empty."""
    return Binding(data, parse_hex("--nonce", nonce, REPORT_DATA_BYTES) if nonce else b"", b"")


def _write(folder: Path, collected: Evidence) -> list[Path]:
    content = {"evidence": collected.evidence}
    content |= {f"endorsement-{number}": data for number, data in enumerate(collected.endorsements, 1)}
    try:
        folder.mkdir(parents=True)
        for name, data in content.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise ConfigurationError(f"cannot write to {folder}: {error.strerror}") from None
    return [folder / name for name in content]
