"""How exact the delta is on activations captured from the demo model, layer by layer and group by group (P4).

    python benchmarks/precision.py [--quick] [--json FILE] [--picture FILE] [--text FILE] [--model DIR]

The model reads its twenty questions and answers; every layer's inputs (q,k,v / o / gate,up / down) are kept and put
through factoring, rounding and the real engine, at 12 and at 14 weight bits. The adapter is the demo adapter where it
has weights (q, k, v, o) and a random one of the same rank elsewhere. Three errors are told apart, and then measured
together, each relative to ‖x‖·‖A'‖_F/√d, as the norm over a projection's outputs:

    he         z from the engine against the integer weights' exact product
    weights    the integer weights against A' in float64
    u          U in float32, z cast to float32 and their product in float32, against s·B·A·x in float64
    together   what the host adds to its activations against s·B·A·x in float64
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import (
    EncodedGroup,
    Evaluator,
    GroupWeights,
    HostSession,
    ParameterSet,
    compile_plans,
    get_parameter_set,
    select_plan,
)
from tensorguard.lora.adapter import LoraAdapter, LoraModule, ModuleKey
from tensorguard.lora.factorisation import FactoredProjection
from tensorguard.lora.groups import GROUPS, RoundedGroup, round_group, split_group

ROOT = Path(__file__).resolve().parent.parent
BITS = (12, 14)
PARTS = ("he", "weights", "u", "together")
BOUNDS = {"he": -14, "together": -12, "worst case": -9}
"""log2, of property P4."""
SESSION = b"precision benchmark"
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """Over all tokens."""

    rms: float
    largest: float


@dataclass(frozen=True)
class Record:
    """One projection at one number of weight bits."""

    layer: int
    group: str
    projection: str
    bits: int
    tokens: int
    d_in: int
    rank: int
    outlier: float
    """Largest activation of the layer's input relative to its root mean square."""
    bound: float
    """Worst case over all inputs of the group, rounding and encryption, as packing computes it."""
    errors: Mapping[str, Error]


class Engine:
    """Host and evaluator of one session."""

    def __init__(self, parameters: ParameterSet) -> None:
        self.parameters = parameters
        seed = os.urandom(32)
        self._host = HostSession.create(parameters, seed, SESSION)
        self._evaluator = Evaluator(parameters, self._host.public_key, seed, SESSION)

    def product(self, x: Values, group: RoundedGroup) -> Values:
        """z [T, rows]."""
        exponents = tuple(p.scale_exponent for p in group.projections for _ in range(p.rank))
        weights = GroupWeights(group.integers, exponents, group.norm_bound)
        plans = compile_plans(self.parameters, group.d_in, group.rows, (64,))
        plan = select_plan(plans, self.parameters, len(x), group.d_in, group.rows)
        sent = self._host.encrypt(x, plan, group.norm_bound)
        encoded = EncodedGroup(weights, self.parameters, [plan])
        response = self._evaluator.evaluate(encoded, plan, sent.tokens, sent.ids, sent.seeds, sent.b)
        return self._host.decrypt(sent, response, group.rows, weights.row_scales)


def measure(
    engine: Engine,
    layer: int,
    group: str,
    modules: Mapping[ModuleKey, LoraModule],
    factored: Mapping[str, FactoredProjection],
    activations: npt.NDArray[np.float32],
) -> list[Record]:
    """The errors of one group on activations [T, d_in]."""
    rounded = round_group(layer, group, factored, engine.parameters)
    x = activations.astype(np.float64)
    z = engine.product(x, rounded)
    records = []
    for info in rounded.projections:
        module, projection = modules[layer, info.name], factored[info.name]
        rows = slice(info.row_offset, info.row_offset + info.rank)
        integers = np.ldexp(rounded.integers[rows].astype(np.float64), -info.scale_exponent)
        ideal = projection.weights @ x.T
        delta = module.scaling * (module.B.astype(np.float64) @ (module.A.astype(np.float64) @ x.T))
        unit = np.linalg.norm(x, axis=1) * np.linalg.norm(projection.weights) / math.sqrt(rounded.d_in)
        differences = {
            "he": z[:, rows].T - integers @ x.T,
            "weights": integers @ x.T - ideal,
            "u": host_product(projection, ideal) - delta,
            "together": host_product(projection, z[:, rows].T) - delta,
        }
        relative = {name: np.linalg.norm(values, axis=0) / unit for name, values in differences.items()}
        records.append(
            Record(
                layer=layer,
                group=group,
                projection=info.name,
                bits=engine.parameters.weight_bits,
                tokens=len(x),
                d_in=rounded.d_in,
                rank=info.rank,
                outlier=float(np.abs(x).max() / np.sqrt(np.mean(x**2))),
                bound=rounded.error,
                errors={
                    name: Error(float(np.sqrt(np.mean(values**2))), float(values.max()))
                    for name, values in relative.items()
                },
            )
        )
    return records


def host_product(projection: FactoredProjection, z: Values) -> Values:
    """U·z as the hooks compute it: both in float32, the product in float32."""
    return np.asarray(projection.u @ z.astype(np.float32), np.float64)


def random_module(d_out: int, d_in: int, rank: int, generator: np.random.Generator) -> LoraModule:
    a = generator.standard_normal((rank, d_in)) / math.sqrt(d_in)
    b = 0.02 * generator.standard_normal((d_out, rank))
    return LoraModule(A=a.astype(np.float32), B=b.astype(np.float32), scaling=2.0)


def adapter_modules(config: Mapping[str, Any]) -> dict[ModuleKey, LoraModule]:
    """The demo adapter, and random modules of its rank for the projections of the MLP."""
    adapter = LoraAdapter.load(ROOT / "examples" / "demo_adapter" / "adapter")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    modules, generator = dict(adapter.modules), np.random.default_rng(0)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            modules[layer, name] = random_module(*shape, adapter.rank, generator)
    return modules


def chats() -> list[list[dict[str, str]]]:
    report = json.loads((ROOT / "examples" / "demo_adapter" / "adapter" / "report.json").read_text())
    return [
        [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["base"]}]
        for answer in report["answers"]
    ]


def summary(records: Sequence[Record]) -> str:
    """log2 of the errors, the worst layer and projection of each group."""
    tokens, layers = records[0].tokens, len({r.layer for r in records})
    lines = [
        f"{tokens} captured tokens, {layers} layers; log2 of the error relative to |x|.|A'|_F/sqrt(d), worst layer and",
        "projection of each group: root mean square over tokens / worst token. Bounds (P4): he -14, together -12, and",
        "-9 for the worst input there is, which packing bounds (last column).",
        "",
        f"{'group':<9}{'bits':>5}{'outlier':>9}" + "".join(f"{part:>17}" for part in PARTS) + f"{'worst input':>13}",
    ]
    for group in dict.fromkeys(r.group for r in records):
        for bits in dict.fromkeys(r.bits for r in records):
            chosen = [r for r in records if (r.group, r.bits) == (group, bits)]
            cells = ""
            for part in PARTS:
                rms = math.log2(max(r.errors[part].rms for r in chosen))
                largest = math.log2(max(r.errors[part].largest for r in chosen))
                cells += f"{f'{rms:.1f} / {largest:.1f}':>17}"
            outlier, bound = max(r.outlier for r in chosen), math.log2(max(r.bound for r in chosen))
            lines.append(f"{group:<9}{bits:>5}{outlier:>9.0f}{cells}{bound:>13.1f}")
    lines.append("")
    for part in ("he", "together"):
        over = [r for r in records if r.errors[part].largest > 2.0 ** BOUNDS[part]]
        worst = max(records, key=lambda r: r.errors[part].largest)
        lines.append(
            f"{part}: {len(records) - len(over)} of {len(records)} (layer, projection, bits) have every token under "
            f"2^{BOUNDS[part]}; the worst token is 2^{math.log2(worst.errors[part].largest):.2f} "
            f"(layer {worst.layer} {worst.projection}, {worst.bits} bits)"
        )
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(r.group for r in records))
    figure, axes = plt.subplots(len(BITS), len(groups), figsize=(14, 6), sharex=True, sharey=True, layout="constrained")
    colours = dict(zip(PARTS, ("tab:green", "tab:orange", "tab:grey", "black"), strict=True))
    for row, bits in zip(axes, BITS, strict=True):
        for axis, group in zip(row, groups, strict=True):
            chosen = [r for r in records if (r.group, r.bits) == (group, bits)]
            layers = sorted({r.layer for r in chosen})
            for part in PARTS:
                for field, style in (("rms", "-"), ("largest", ":")):
                    worst = [max(getattr(r.errors[part], field) for r in chosen if r.layer == n) for n in layers]
                    label = part if style == "-" else None
                    axis.plot(layers, np.log2(worst), style, color=colours[part], label=label)
            for name, bound in BOUNDS.items():
                axis.axhline(bound, color=colours.get(name, "tab:red"), linewidth=0.8, linestyle="--")
            axis.set_title(f"{group}, {bits} bits", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize=9)
    figure.suptitle("solid: root mean square over tokens; dotted: worst token; dashed: bounds of P4", fontsize=9)
    for row in axes:
        row[0].set_ylabel("log2 relative error")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three layers and 64 tokens")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG file")
    parser.add_argument("--text", type=Path, help="write the table here")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the demo model)")
    options = parser.parse_args(arguments)
    from tensorguard.models.activations import capture
    from tensorguard.models.smollm2 import prepare_smollm2

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    model = options.model or prepare_smollm2(ROOT / ".cache" / "models", say)
    config = json.loads((model / "config.json").read_text())
    modules = adapter_modules(config)
    layers = range(config["num_hidden_layers"])
    if options.quick:
        layers = (0, len(layers) // 2, len(layers) - 1)
        options.tokens = 64
    keys = [(layer, group) for layer in layers for group in GROUPS]
    say(f"capturing activations of {len(keys)} groups")
    captured = capture(model, chats(), options.tokens, set(keys))
    engines = [Engine(get_parameter_set(f"n4096-q90-w{bits}")) for bits in BITS]
    records: list[Record] = []
    for number, (layer, group) in enumerate(keys, 1):
        print(f"\rgroup {number} of {len(keys)}", end="", file=sys.stderr, flush=True)
        factored = split_group(layer, group, modules)
        for engine in engines:
            records += measure(engine, layer, group, modules, factored, captured[layer, group])
    say("")
    text = summary(records)
    print(text)
    if options.text:
        options.text.write_text(text + "\n")
    if options.json:
        lines = ",\n".join(json.dumps(asdict(record)) for record in records)
        options.json.write_text(f"[\n{lines}\n]\n")
    if options.picture:
        draw(records, options.picture)


if __name__ == "__main__":
    main()
