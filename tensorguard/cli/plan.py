"""`tensafe plan`: how a product is cut into polynomials, why so, and what an adapter takes in memory and time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, PARAMETER_SETS, ParameterSet, get_parameter_set
from tensorguard.ckks.plan import MAX_OUTPUTS, TOKEN_COUNTS, Plan
from tensorguard.ckks.planner import (
    CallCost,
    call_cost,
    compile_plans,
    default_memory_limit,
    rank_plans,
    select_plan,
    share_memory,
)
from tensorguard.cli.pack import PackMode
from tensorguard.cli.sizes import parse_bytes, show_bytes
from tensorguard.errors import ConfigurationError, InvalidInputError
from tensorguard.lora.adapter import projection_shapes
from tensorguard.lora.groups import GROUPS

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

ADAPTER_SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
    },
}
"""What the models' config.json say (names: meta-llama, HuggingFaceTB)."""
_SHOWN_TOKENS = (1, 8, 64)


@app.command()
def plan(
    d: Annotated[int | None, typer.Option("--d", min=1, help="Input channels of the matrix.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Its rows: the ranks of the group, added up.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in one call.")] = 1,
    adapter_shape: Annotated[
        str | None, typer.Option(help=f"A whole adapter of a known model: {', '.join(ADAPTER_SHAPES)}.")
    ] = None,
    base_model: Annotated[Path | None, typer.Option(help="A whole adapter of the model in this folder.")] = None,
    rank: Annotated[int, typer.Option(min=1, max=128, help="Rank of that adapter.")] = 16,
    targets: Annotated[str, typer.Option(help="Its projections, with commas.")] = "q_proj,k_proj,v_proj,o_proj",
    mode: Annotated[PackMode, typer.Option(help="How it is packed.")] = PackMode.factored,
    parameters: Annotated[
        str, typer.Option(help=f"One of {', '.join(sorted(PARAMETER_SETS))}.")
    ] = DEFAULT_PARAMETER_SET,
    memory_limit: Annotated[
        str | None, typer.Option(help="Most memory for the weights, such as 64M; default: what `tensafe pack` takes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Explain the plan of one matrix (--d, --rows, --tokens), or the plans and memory of a whole adapter."""
    chosen = get_parameter_set(parameters)
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if (adapter_shape is None) + (base_model is None) + (d is None) != 2 or (d is None) != (rows is None):
        raise InvalidInputError("name a matrix (--d and --rows), or an adapter by --adapter-shape or --base-model")
    if d is not None and rows is not None:
        explanation = explain_matrix(chosen, d, rows, tokens, limit)
        show = _show_matrix
    else:
        config = _model_config(adapter_shape, base_model)
        explanation = explain_adapter(chosen, config, rank, targets.split(","), mode is PackMode.full, limit)
        show = _show_adapter
    if as_json:
        typer.echo(json.dumps(explanation, indent=2))
    else:
        show(explanation, Console(soft_wrap=True))


def explain_matrix(
    parameters: ParameterSet, d_in: int, rows: int, tokens: int, memory_limit: int | None
) -> dict[str, Any]:
    """The cheapest plans for this many tokens, what keeps the first from being cheaper, and what would be packed."""
    limit = default_memory_limit(parameters, d_in, rows) if memory_limit is None else memory_limit
    ranked = rank_plans(parameters, tokens, d_in, rows, limit)
    packed = compile_plans(parameters, d_in, rows, memory_limit=limit)
    return {
        "parameters": parameters.name,
        "d": d_in,
        "rows": rows,
        "tokens": tokens,
        "memory_limit_bytes": limit,
        "plans": [_record(cost) for cost in _different(ranked)[:6]],
        "plans_compared": len(ranked),
        "limits": _limits(parameters, ranked[0], tokens, d_in, rows, limit),
        "packed_plans": [plan.identifier for plan in packed],
        "packed_memory_bytes": sum(plan.weight_bytes(parameters, d_in, rows) for plan in packed),
        "packed_choice": select_plan(packed, parameters, tokens, d_in, rows).identifier,
    }


def _different(ranked: list[CallCost]) -> list[CallCost]:
    """The best plan for each number of tokens, blocks and row groups; others differ in empty places only."""
    first: dict[tuple[int, int, int, int], CallCost] = {}
    for cost in ranked:
        first.setdefault((cost.plan.tokens, cost.uploads, cost.downloads, cost.products), cost)
    return list(first.values())


def _limits(
    parameters: ParameterSet, best: CallCost, tokens: int, d_in: int, rows: int, memory_limit: int
) -> list[str]:
    """What stands in the way of a cheaper plan, in words."""
    plan = best.plan
    found = [f"T'·d'·r' takes {plan.filled} of the ring's {parameters.degree} coefficients"]
    outputs = f"T'·r' is {plan.tokens * plan.rows} of {MAX_OUTPUTS} outputs that a response may have"
    found.append(outputs + (": the limit" if 2 * plan.tokens * plan.rows > MAX_OUTPUTS else ""))
    unlimited = rank_plans(parameters, tokens, d_in, rows, 1 << 62)[0]
    if unlimited.plan != plan:
        found.append(
            f"memory: {unlimited.plan.identifier} would take {unlimited.microseconds:,.0f} us, but its weights "
            f"{show_bytes(unlimited.memory_bytes)}, over the limit of {show_bytes(memory_limit)}"
        )
    else:
        found.append(f"memory: {show_bytes(best.memory_bytes)} of at most {show_bytes(memory_limit)}")
    parts = {
        "uploads": best.upload_us,
        "responses": best.response_us,
        "products": best.product_us,
        "the link": best.link_us,
        "what any plan costs": best.call_us,
    }
    shares = ", ".join(f"{name} {value / best.microseconds:.0%}" for name, value in parts.items())
    return [*found, f"modelled time: {shares}"]


def explain_adapter(
    parameters: ParameterSet,
    config: dict[str, Any],
    rank: int,
    targets: list[str],
    full: bool,
    memory_limit: int | None,
) -> dict[str, Any]:
    """Plans, memory and modelled time of an adapter of this shape as `tensafe pack` would seal it."""
    shapes = projection_shapes(config)
    if unknown := [name for name in targets if name not in shapes]:
        raise InvalidInputError(f"there is no projection {unknown[0]!r:.40}; use {', '.join(shapes)}")
    layers = int(config["num_hidden_layers"])
    groups: list[tuple[str, int, int]] = []
    for name, members in GROUPS.items():
        present = [shapes[member] for member in members if member in targets]
        if present:
            height = sum(d_out if full else min(rank, d_out) for d_out, _ in present)
            groups.append((name, present[0][1], height))
    limits = share_memory(parameters, [(d_in, rows) for _, d_in, rows in groups for _ in range(layers)], memory_limit)
    records, memory = [], 0
    total = dict.fromkeys(_SHOWN_TOKENS, 0.0)
    for number, (name, d_in, rows) in enumerate(groups):
        plans = compile_plans(parameters, d_in, rows, memory_limit=limits[number * layers])
        per_layer = sum(plan.weight_bytes(parameters, d_in, rows) for plan in plans)
        times = {tokens: _time(plans, parameters, tokens, d_in, rows) for tokens in _SHOWN_TOKENS}
        memory += layers * per_layer
        for tokens, microseconds in times.items():
            total[tokens] += layers * microseconds
        records.append(
            {
                "group": name,
                "d": d_in,
                "rows": rows,
                "plans": [plan.identifier for plan in plans],
                "memory_bytes": per_layer,
                "microseconds": {str(tokens): microseconds for tokens, microseconds in times.items()},
            }
        )
    return {
        "parameters": parameters.name,
        "mode": "full" if full else "factored",
        "layers": layers,
        "groups": records,
        "memory_bytes": memory,
        "microseconds": {str(tokens): microseconds for tokens, microseconds in total.items()},
    }


def _time(plans: tuple[Plan, ...], parameters: ParameterSet, tokens: int, d_in: int, rows: int) -> float:
    chosen = select_plan(plans, parameters, tokens, d_in, rows)
    return call_cost(chosen, parameters, tokens, d_in, rows).microseconds


def _model_config(adapter_shape: str | None, base_model: Path | None) -> dict[str, Any]:
    if adapter_shape is not None:
        try:
            return dict(ADAPTER_SHAPES[adapter_shape])
        except KeyError:
            raise InvalidInputError(
                f"no shape {adapter_shape!r:.40} is known here; use {', '.join(ADAPTER_SHAPES)}, or --base-model FOLDER"
            ) from None
    assert base_model is not None
    path = base_model / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("num_hidden_layers"), int):
        raise ConfigurationError(f"{path} has no usable num_hidden_layers")
    return config


def _record(cost: CallCost) -> dict[str, Any]:
    return asdict(cost) | {"plan": cost.plan.identifier, "microseconds": cost.microseconds}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _show_matrix(explanation: dict[str, Any], console: Console) -> None:
    title = "{rows} x {d}, {tokens} token(s) a call, {parameters}".format_map(explanation)
    table = _table(title, "plan", "up", "down", "products", "NTTs", "KiB up", "down", "model us", "", "weights")
    plans = explanation["plans"]
    for cost in plans:
        table.add_row(
            cost["plan"],
            *(f"{cost[name]:,}" for name in ("uploads", "downloads", "products", "transforms")),
            *(f"{cost[name] / 1024:,.0f}" for name in ("bytes_up", "bytes_down")),
            f"{cost['microseconds']:,.0f}",
            f"{cost['microseconds'] / plans[0]['microseconds']:.2f}",
            show_bytes(cost["memory_bytes"]),
        )
    console.print(table)
    tokens, channels, height = (part[1:] for part in plans[0]["plan"].split("."))
    lines = [
        f"Chosen of {explanation['plans_compared']}: {plans[0]['plan']}. {tokens} token(s), {channels} channels and "
        f"{height} row(s) share a polynomial.",
        *(f"- {line}" for line in explanation["limits"]),
        f"Packed for {TOKEN_COUNTS[0]} to {TOKEN_COUNTS[-1]} tokens: {', '.join(explanation['packed_plans'])} "
        f"({show_bytes(explanation['packed_memory_bytes'])}); this call would use {explanation['packed_choice']}.",
    ]
    console.print("\n".join(lines), highlight=False)


def _show_adapter(explanation: dict[str, Any], console: Console) -> None:
    title = "{layers} layers, {mode} mode, {parameters}".format_map(explanation)
    table = _table(title, "group", "rows", "d", "weights a layer", *(f"ms, T = {n}" for n in _SHOWN_TOKENS))
    for record in explanation["groups"]:
        table.add_row(
            record["group"],
            *(f"{record[name]:,}" for name in ("rows", "d")),
            show_bytes(record["memory_bytes"]),
            *(f"{record['microseconds'][str(n)] / 1e3:,.2f}" for n in _SHOWN_TOKENS),
        )
    console.print(table)
    times = ", ".join(f"{explanation['microseconds'][str(n)] / 1e3:,.0f} ms for {n}" for n in _SHOWN_TOKENS)
    lines = [
        *(f"{record['group']}: {' '.join(record['plans'])}" for record in explanation["groups"]),
        f"In all: {show_bytes(explanation['memory_bytes'])} of transformed weights, shared by all sessions. Modelled "
        f"time of one call to every group, host and coprocessor on one core: {times} token(s).",
    ]
    console.print("\n".join(lines), highlight=False)
