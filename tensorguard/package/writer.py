"""Making packages: read, factor, round, check, seal, sign, read back, register the key, name the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from tensorguard.ckks.parameters import (
    DEFAULT_PARAMETER_SET,
    PARAMETER_SETS,
    ParameterSet,
    get_parameter_set,
)
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.planner import compile_plans, share_memory
from tensorguard.ckks.weights import GroupWeights
from tensorguard.crypto.aead import KEY_BYTES, seal_part
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
from tensorguard.package.envelope import VerifiedManifest, make_envelope
from tensorguard.package.manifest import (
    Group,
    Manifest,
    MoaiContract,
    Part,
    PeftSummary,
    Projection,
    ReleasePolicy,
)
from tensorguard.package.names import check_name, check_sequence
from tensorguard.package.parts import encode_basis, encode_weights, part_context
from tensorguard.package.reader import key_id, open_manifest, read_adapter

DEFAULT_TOKEN_BUDGET = 1_000_000
DEFAULT_LIFE_SECONDS = 365 * 24 * 3600
_MAX_CONFIG_BYTES = 4 * 1024 * 1024

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


class KeyRegistrar(Protocol):
    """Hands a content key to the attestor that will release it (`PackageKeyRegistry.register`).

    Must raise when it cannot, or when the sequence is taken or too old.
    """

    def __call__(
        self,
        *,
        manifest_digest: str,
        tenant: str,
        package_id: str,
        sequence: int,
        key_id: str,
        content_key: bytes,
        token_budget: int,
        expires: int,
        release_policy_sha256: str,
    ) -> object: ...


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
    if output.exists():
        raise ConfigurationError(f"{output} exists already; it is not overwritten")
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
    content_key = os.urandom(KEY_BYTES)
    created = int(time.time())
    sealed: list[tuple[Literal["weights", "basis"], bytes]] = [("weights", encode_weights(groups))]
    if mode == "factored":
        sealed.append(("basis", encode_basis(groups)))
    parts, data, offset = [], [], 0
    for role, plaintext in sealed:
        context = part_context(tenant, package_id, sequence, key_id(content_key), role, role)
        ciphertext = seal_part(content_key, context, plaintext)
        digest = hashlib.sha256(ciphertext).hexdigest()
        parts.append(Part(name=role, role=role, offset=offset, size=len(ciphertext), sha256=digest))
        data.append(ciphertext)
        offset += len(ciphertext)
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
        parts=tuple(parts),
    )
    with _new_file(output, [make_envelope(manifest, signing_keys), *data]) as temporary:
        verified = open_manifest(temporary, signing_keys.public)
        read_adapter(temporary, verified, content_key, privacy_bound_log2=privacy_bound_log2)
        key_registrar(
            manifest_digest=verified.digest,
            tenant=tenant,
            package_id=package_id,
            sequence=sequence,
            key_id=manifest.key_id,
            content_key=content_key,
            token_budget=token_budget,
            expires=manifest.expires,
            release_policy_sha256="" if release_policy is None else release_policy.sha256,
        )
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


@contextlib.contextmanager
def _new_file(path: Path, pieces: list[bytes]) -> Any:
    """A temporary file beside `path`, which becomes `path` when the block succeeds and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as stream:
                stream.writelines(pieces)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
        yield temporary
        try:
            os.link(temporary, path)
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
