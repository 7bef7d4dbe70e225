"""`tensafe pack`: seal an adapter and give its key to an attestor."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tensorguard.ckks.parameters import PARAMETER_SETS
from tensorguard.cli.sizes import parse_bytes
from tensorguard.cli.state_options import (
    DEFAULT_STATE,
    DatabaseUrl,
    KeyName,
    StateDirectory,
    Witnesses,
    location,
)
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import PermissionDeniedError
from tensorguard.package.contract import DEFAULT_PRIVACY_BOUND_LOG2
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.package.publishers import remember_publisher
from tensorguard.package.writer import DEFAULT_TOKEN_BUDGET, pack_adapter
from tensorguard.store.state import AttestorState


class PackMode(str, Enum):
    """What the inference host may learn (docs/protocol.md)."""

    factored = "factored"
    full = "full"


app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pack(
    adapter: Annotated[Path, typer.Option(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    base_model: Annotated[Path, typer.Option(help="Folder of the base model the adapter was trained on.")],
    output: Annotated[Path, typer.Option(help="The package to make; must not exist.")],
    tenant: Annotated[str, typer.Option(help="Who owns the adapter.")],
    package_id: Annotated[str, typer.Option(help="Name of the adapter; also its model name.")],
    sequence: Annotated[int, typer.Option(min=1, help="Version; each new one must be higher.")],
    signing_key: Annotated[Path, typer.Option(help="Private key file made by `tensafe keys generate`.")],
    attestor_state: StateDirectory = DEFAULT_STATE,
    database_url: DatabaseUrl = None,
    key: KeyName = None,
    witness: Witnesses = None,
    parameter_set: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(sorted(PARAMETER_SETS))}; default: the first that is exact enough."),
    ] = None,
    mode: Annotated[
        PackMode, typer.Option(help="factored: the host gets U and z; full: deltas alone, at d_out / r times the cost.")
    ] = PackMode.factored,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Most memory of the coprocessor for this adapter, such as 800M or 1G (powers of 1024)."),
    ] = None,
    token_budget: Annotated[
        int, typer.Option(min=1, help="Tokens that this version may serve in all.")
    ] = DEFAULT_TOKEN_BUDGET,
    expires_days: Annotated[int, typer.Option(min=1, max=36500, help="Days until the package expires.")] = 365,
    privacy_bound: Annotated[
        int, typer.Option(min=-256, max=0, help="Largest statistical distance over the budget, as log2.")
    ] = DEFAULT_PRIVACY_BOUND_LOG2,
    policy: Annotated[
        Path | None, typer.Option(help="Attestor policy file to name in the package as its release policy.")
    ] = None,
) -> None:
    """Seal a PEFT adapter into a .tssp package and register its content key with an attestor."""
    keys = SigningKeys.read(signing_key)
    wanted_policy = None if policy is None else _release_policy(policy)
    with AttestorState(location(attestor_state, database_url, key, witness)) as state:
        newest = state.packages.newest_sequence(tenant, package_id)
        if newest is not None and sequence <= newest:
            raise PermissionDeniedError(
                f"sequence {sequence} of {tenant}/{package_id} is not above {newest}, the newest one registered"
            )
        console = Console(stderr=True)
        columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console) as display:
            tasks: dict[str, TaskID] = {}

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = display.add_task(what, total=total)
                display.update(tasks[what], completed=done, total=total)

            verified = pack_adapter(
                adapter,
                output,
                base_model_dir=base_model,
                tenant=tenant,
                package_id=package_id,
                sequence=sequence,
                signing_keys=keys,
                key_registrar=state.packages.register,
                parameter_set=parameter_set,
                mode=mode.value,
                memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
                token_budget=token_budget,
                life_seconds=expires_days * 24 * 3600,
                privacy_bound_log2=privacy_bound,
                release_policy=wanted_policy,
                progress=report,
            )
        remember_publisher(state.directory, keys.public)
    contract = verified.manifest.moai
    typer.echo(
        f"{output}: {tenant}/{package_id} sequence {sequence}, {len(contract.groups)} groups, "
        f"{contract.mode} mode, {contract.parameter_set}, statistical distance 2^{contract.total_variation_log2}\n"
        f"manifest {verified.digest}"
    )


def _release_policy(path: Path) -> ReleasePolicy:
    from tensorguard.evidence.policy import load_policy  # the evidence layer is needed for this option only

    policy = load_policy(path)
    return ReleasePolicy(id=policy.id, sha256=policy.sha256)
