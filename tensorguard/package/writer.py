"""Making packages from PEFT adapters: read, factor, round, check, seal and publish."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tensorguard.ckks.parameters import (
    DEFAULT_PARAMETER_SET,
    PARAMETER_SETS,
    ParameterSet,
    get_parameter_set,
)
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.planner import compile_plans, share_memory
from tensorguard.ckks.weights import GroupWeights
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError, InvalidInputError
from tensorguard.lora.adapter import LoraAdapter
from tensorguard.lora.groups import ERROR_BOUND, Mode, RoundedGroup, build_groups
from tensorguard.models.identity import base_model_identity
from tensorguard.package.base_model import reference
from tensorguard.package.contract import (
    DEFAULT_PRIVACY_BOUND_LOG2,
    check_privacy,
    package_total_variation,
)
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.manifest import (
    Group,
    Manifest,
    MoaiContract,
    PartRole,
    PeftSummary,
    Projection,
    ReleasePolicy,
)
from tensorguard.package.names import check_name, check_sequence
from tensorguard.package.parts import encode_basis, encode_weights
from tensorguard.package.reader import key_id
from tensorguard.package.sealing import KeyRegistrar, check_is_new, new_content_key, publish, seal_parts

DEFAULT_TOKEN_BUDGET = 1_000_000
DEFAULT_LIFE_SECONDS = 365 * 24 * 3600
_MAX_CONFIG_BYTES = 4 * 1024 * 1024

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def pack_adapter(
    adapter_dir: Path | str,
    output: Path | str,
    *,
    base_model_dir: Path | str,
    tenant: str,
    package_id: str,
    sequence: int,
    signing_keys: SigningKeys,
    key_registrar: KeyRegistrar,
    parameter_set: str | None = None,
    mode: Mode = "factored",
    memory_limit: int | None = None,
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    life_seconds: int = DEFAULT_LIFE_SECONDS,
    privacy_bound_log2: int = DEFAULT_PRIVACY_BOUND_LOG2,
    release_policy: ReleasePolicy | None = None,
    progress: Progress | None = None,
) -> VerifiedManifest:
    """Seal a PEFT adapter into a new file `output`.

    Without `parameter_set`, weight bits rise from 12 until the error bound holds. `mode` "full" seals s*B*A whole: no
    basis, d_out / r times the cost. `memory_limit`: bytes of transformed weights that the coprocessor may hold for
    this adapter; fewer plans are compiled into the package until they fit. The content key is drawn
    here, given to `key_registrar` and forgotten. The file appears under its name only after the key is
    registered.

    Raises UnsupportedAdapterError, MissingWeightsError (adapter), ConfigurationError (options, base model,
    file exists), InvalidInputError (no plans fit the memory limit), PrivacyBoundError (no parameter set keeps
    the error bound, or the token budget is too high for the privacy bound), and whatever `key_registrar` raises.
    """
    output = Path(output)
    check_name(tenant, "tenant")
    check_name(package_id, "package id")
    check_sequence(sequence)
    if not 1 <= token_budget <= 2**53 - 1 or not 1 <= life_seconds <= 2**40:
        raise InvalidInputError("token budget and life must be positive")
    check_is_new(output)
    report = progress or (lambda what, done, total: None)

    report("reading", 0, 1)
    adapter = LoraAdapter.load(adapter_dir)
    adapter.check_model(_read_model_config(Path(base_model_dir)))
    identity = base_model_identity(base_model_dir)
    report("reading", 1, 1)
    chosen, groups = build_groups(
        adapter.modules, _candidates(parameter_set), lambda done, total: report("factoring", done, total), mode=mode
    )
    parameters = cast(ParameterSet, chosen)
    shapes = [(group.d_in, group.rows) for group in groups]
    limits = share_memory(parameters, shapes, memory_limit)
    plans = [compile_plans(parameters, *shape, memory_limit=limit) for shape, limit in zip(shapes, limits, strict=True)]
    distance = package_total_variation(
        parameters,
        ((_weights(group), group_plans) for group, group_plans in zip(groups, plans, strict=True)),
        token_budget,
    )
    check_privacy(distance, privacy_bound_log2)

    report("sealing", 0, 1)
    content_key = new_content_key()
    created = int(time.time())
    plaintexts: dict[PartRole, bytes] = {"weights": encode_weights(groups)}
    if mode == "factored":
        plaintexts["basis"] = encode_basis(groups)
    parts, ciphertexts = seal_parts(content_key, tenant, package_id, sequence, plaintexts)
    manifest = Manifest(
        version=1,
        tenant=tenant,
        package_id=package_id,
        sequence=sequence,
        created=created,
        expires=created + life_seconds,
        key_id=key_id(content_key),
        token_budget=token_budget,
        release_policy=release_policy,
        base_model=reference(identity),
        peft=PeftSummary(
            r=adapter.rank,
            alpha=adapter.alpha,
            use_rslora=adapter.use_rslora,
            target_modules=adapter.target_modules,
        ),
        moai=MoaiContract(
            parameter_set=parameters.name,
            mode=mode,
            rotations=0,
            evaluation_keys=0,
            groups=tuple(_describe(group, members) for group, members in zip(groups, plans, strict=True)),
            total_variation_log2=math.ceil(distance),
            privacy_bound_log2=privacy_bound_log2,
        ),
        parts=parts,
    )
    verified = publish(output, manifest, ciphertexts, content_key, signing_keys, key_registrar)
    report("sealing", 1, 1)
    return verified


def _candidates(name: str | None) -> list[ParameterSet]:
    if name is not None:
        return [get_parameter_set(name)]
    default = get_parameter_set(DEFAULT_PARAMETER_SET)
    same_ring = (member for member in PARAMETER_SETS.values() if member.primes == default.primes)
    wide_enough = (member for member in same_ring if member.weight_bits >= default.weight_bits)
    return sorted(wide_enough, key=lambda member: member.weight_bits)


def _weights(group: RoundedGroup) -> GroupWeights:
    exponents = tuple(exponent for info in group.projections for exponent in (info.scale_exponent,) * info.rank)
    return GroupWeights(group.integers, exponents, group.norm_bound)


def _describe(group: RoundedGroup, plans: tuple[Plan, ...]) -> Group:
    # The bound that was checked is published, not the error found: that would tell about the weights.
    return Group.model_validate(
        {
            "layer": group.layer,
            "group": group.group,
            "d_in": group.d_in,
            "projections": tuple(
                Projection.model_validate(
                    {
                        "name": info.name,
                        "rank": info.rank,
                        "d_out": info.d_out,
                        "row_offset": info.row_offset,
                        "scale_exponent": info.scale_exponent,
                    }
                )
                for info in group.projections
            ),
            "norm_bound": group.norm_bound,
            "error_bound": ERROR_BOUND,
            "plans": tuple(plan.identifier for plan in plans),
        }
    )


def _read_model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_CONFIG_BYTES + 1)
        config = json.loads(data) if len(data) <= _MAX_CONFIG_BYTES else None
    except OSError as error:
        raise ConfigurationError(f"cannot read base model {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is not a JSON object of at most {_MAX_CONFIG_BYTES} bytes")
    return config
