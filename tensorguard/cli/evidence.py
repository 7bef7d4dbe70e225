"""`tensafe evidence`: appraise evidence without a server."""

from __future__ import annotations

import json

import typer

from tensorguard.cli import evidence_options as options
from tensorguard.cli.appraisal import EvidenceFiles, report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
EXIT_REFUSED = 3


@app.callback()
def _evidence() -> None:
    """Appraise evidence without a server and without the network."""


@app.command()
def verify(
    kind: options.Kind,
    evidence: options.EvidenceFile,
    policy: options.PolicyFile,
    endorsements: options.Endorsements = None,
    more_endorsements: options.MoreEndorsements = None,
    at: options.At = "",
    nonce: options.Nonce = "",
    report_data: options.ReportData = "",
    role: options.RoleName = None,
    simulated_root: options.SimulatedRoot = None,
    as_json: options.AsJson = False,
) -> None:
    """Say whether evidence is authentic and what the policy allows. The policy's tenants and lease have no part in it.

    Exit code 0 when it is accepted, 3 when it is refused, 2 for wrong usage or files.
    """
    given = [*(endorsements or ()), *(more_endorsements or ())]
    files = EvidenceFiles(kind, evidence, given, policy, at, nonce, report_data, role, simulated_root)
    request, result = files.appraise()
    if as_json:
        typer.echo(json.dumps(report(request, result)))
    elif result.claims is not None:
        typer.echo(json.dumps(report(request, result)["claims"], indent=2))
    if result.accepted:
        if not as_json:
            exchange = "" if request.nonce or request.report_data else " (of no exchange: no --nonce, no --report-data)"
            typer.echo(f"accepted by policy {request.policy.id}{exchange}")
        return
    refused = result.refusals[0]
    typer.echo(f"tensafe: refused: {refused.message} [{refused.detail}]", err=True)
    raise typer.Exit(EXIT_REFUSED)
