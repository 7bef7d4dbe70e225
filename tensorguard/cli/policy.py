"""`tensafe policy`: check a policy, and explain what it says about evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tensorguard.cli import evidence_options as options
from tensorguard.cli.appraisal import EvidenceFiles, refusal, report
from tensorguard.evidence.policy import load_policy, policy_json_schema
from tensorguard.evidence.policy_lint import weaknesses

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
EXIT_REFUSED = 3


@app.callback()
def _policy() -> None:
    """Check a policy, and explain what it says about evidence."""


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="The policy (YAML or JSON).")],
    as_json: options.AsJson = False,
) -> None:
    """Check a policy as an attestor would, and name what it permits that a strict one would not.

    Exit code 2 when an attestor would refuse it; what it permits is no error.
    """
    policy = load_policy(file)
    found = weaknesses(policy)
    if as_json:
        typer.echo(json.dumps({"id": policy.id, "sha256": policy.sha256, "permits": found}))
        return
    typer.echo(f"policy {policy.id}: valid, SHA-256 {policy.sha256}")
    for line in found:
        typer.echo(f"  permits: {line}")


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="The policy (YAML or JSON).")],
    kind: options.Kind,
    evidence: options.EvidenceFile,
    endorsements: options.Endorsements = None,
    more_endorsements: options.MoreEndorsements = None,
    at: options.At = "",
    nonce: options.Nonce = "",
    report_data: options.ReportData = "",
    role: options.RoleName = None,
    simulated_root: options.SimulatedRoot = None,
    as_json: options.AsJson = False,
) -> None:
    """Say why this evidence would be refused: every check that does not hold, not only the decisive first one.

    Exit code 0 when it would be accepted, 3 when not.
    """
    given = [*(endorsements or ()), *(more_endorsements or ())]
    files = EvidenceFiles(kind, evidence, given, file, at, nonce, report_data, role, simulated_root)
    request, result = files.appraise()
    if as_json:
        typer.echo(json.dumps({**report(request, result), "refusals": [refusal(item) for item in result.refusals]}))
    elif result.accepted:
        typer.echo(f"policy {request.policy.id} accepts this evidence")
    else:
        if result.claims is None:
            typer.echo("The evidence is not authentic or not of a kind that the policy names; nothing else was asked.")
        for item in result.refusals:
            typer.echo(f"  {item.detail}: {item.message}")
    if not result.accepted:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def schema() -> None:
    """Print the JSON Schema of policies (docs/policy.schema.json), for editors."""
    typer.echo(json.dumps(policy_json_schema(), indent=2))
