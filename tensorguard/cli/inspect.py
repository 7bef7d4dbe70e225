"""`tensafe inspect`: what a package says about itself."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tensorguard.package.envelope import UnverifiedManifest
from tensorguard.package.inspection import read_unverified

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="The .tssp package.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show a package's manifest. Needs no key and checks no signature (`tensafe verify` does)."""
    package = read_unverified(file)
    if as_json:
        result = {
            "signatures_checked": False,
            "digest": package.digest,
            "signer": package.signer,
            "manifest": package.manifest.model_dump(mode="json"),
        }
        typer.echo(json.dumps(result, indent=2))
        return
    Console(soft_wrap=True).print(_table(package))


def _table(package: UnverifiedManifest) -> Table:
    manifest = package.manifest
    contract = manifest.moai
    table = Table("field", title=f"{manifest.tenant}/{manifest.package_id} (signatures not checked)")
    table.add_column("value", overflow="fold")  # hashes are of no use when they are cut
    policy = manifest.release_policy
    layers = sorted({group.layer for group in contract.groups})
    kinds = sorted({projection.name for group in contract.groups for projection in group.projections})
    rows: list[tuple[str, str]] = [
        ("sequence", str(manifest.sequence)),
        ("created, expires", f"{_date(manifest.created)}, {_date(manifest.expires)}"),
        ("manifest SHA-256", package.digest),
        ("signer key id", package.signer),
        ("content key id", manifest.key_id),
        ("token budget", f"{manifest.token_budget:,}"),
        ("release policy", f"{policy.id} ({policy.sha256[:16]})" if policy else "the attestor's"),
        ("base model", manifest.base_model.name),
        ("  config", manifest.base_model.config_sha256),
        ("  tokenizer", manifest.base_model.tokenizer_sha256),
        ("  weights", manifest.base_model.weight_index_sha256),
        ("adapter", f"rank {manifest.peft.r}, alpha {manifest.peft.alpha:g}"),
        ("layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
        ("projections", ", ".join(kinds)),
        ("parameter set", f"{contract.parameter_set}, {contract.mode} mode"),
        ("rotations, evaluation keys", f"{contract.rotations}, {contract.evaluation_keys}"),
        (
            "statistical distance",
            f"2^{contract.total_variation_log2} (limit 2^{contract.privacy_bound_log2})",
        ),
        ("plans", ", ".join(sorted({plan for group in contract.groups for plan in group.plans}))),
    ]
    rows += [(f"part {part.name}", f"{part.size:,} bytes, SHA-256 {part.sha256}") for part in manifest.parts]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s after 1970"
