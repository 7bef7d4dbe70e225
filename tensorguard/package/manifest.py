"""The manifest of a `.tssp` package: what is public about a sealed adapter (docs/tssp.md).

Its bytes are canonical JSON. Models are strict: an unknown field, another type or a value out of bounds is
refused.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)

from tensorguard.crypto import canonical
from tensorguard.errors import InvalidInputError, PackageError
from tensorguard.lora.groups import GROUPS, MAX_SCALE_EXPONENT, Mode
from tensorguard.package.names import MAX_SEQUENCE, NAME_PATTERN

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_PART_BYTES = 16 * 1024**3
MAX_RANK = 128
MAX_ROWS = 2**16
"""Of a group: `tensorguard.ckks.plan.MAX_ROWS`, which is not imported here, since a compiler would come with it."""
PAYLOAD_TYPE = "application/vnd.tensafe.tssp.manifest.v1+json"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Label = Annotated[str, StringConstraints(max_length=256)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PlanIdentifier = Annotated[str, StringConstraints(pattern=r"^t[1-9]\d{0,3}\.c[1-9]\d{0,3}\.r[1-9]\d{0,2}$")]
PartRole = Literal["weights", "basis"]
UnixSeconds = Annotated[int, Field(ge=1, le=2**53 - 1)]


def _float(value: Any) -> Any:
    return canonical.decode_float(value) if isinstance(value, str) else value


Decimal = Annotated[
    float, BeforeValidator(_float), PlainSerializer(canonical.encode_float, return_type=str), Field(gt=0)
]
"""A float that is a string in JSON (`canonical.encode_float`)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ReleasePolicy(_Strict):
    """The attestor policy that the key is to be released under."""

    id: Name
    sha256: Sha256


class BaseModelReference(_Strict):
    """The model the adapter was made for (`tensorguard.models.identity`). The name is a label."""

    name: Label
    config_sha256: Sha256
    tokenizer_sha256: Sha256
    weight_index_sha256: Sha256


class PeftSummary(_Strict):
    """The adapter's configuration, for people."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)]
    alpha: Decimal
    use_rslora: bool
    target_modules: Annotated[tuple[Label, ...], Field(min_length=1, max_length=64)]


class Projection(_Strict):
    """Rows of one projection in its group; A' = integers * 2**-scale_exponent. In full mode the rank is d_out."""

    name: Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    d_out: Annotated[int, Field(ge=1, le=2**20)]
    row_offset: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    scale_exponent: Annotated[int, Field(ge=-MAX_SCALE_EXPONENT, le=MAX_SCALE_EXPONENT)]


class Group(_Strict):
    """The projections of one layer that share an input, and how they may be evaluated."""

    layer: Annotated[int, Field(ge=0, lt=1024)]
    group: Literal["qkv", "o", "gate_up", "down"]
    d_in: Annotated[int, Field(ge=1, le=2**17)]
    projections: Annotated[tuple[Projection, ...], Field(min_length=1, max_length=3)]
    norm_bound: Decimal
    """Frobenius norm that no projection's integers exceed."""
    error_bound: Decimal
    """Worst-case error of z relative to |x| * |A'|_F / sqrt(d_in)."""
    plans: Annotated[tuple[PlanIdentifier, ...], Field(min_length=1, max_length=16)]

    @property
    def rows(self) -> int:
        """Rows of all projections."""
        return sum(projection.rank for projection in self.projections)

    @property
    def tensor_name(self) -> str:
        """Name of the group's integers in the weights part."""
        return f"layer.{self.layer}.{self.group}"

    @property
    def scale_exponents(self) -> tuple[int, ...]:
        """One exponent for each row."""
        return tuple(
            exponent for projection in self.projections for exponent in (projection.scale_exponent,) * projection.rank
        )

    @model_validator(mode="after")
    def _rows_are_stacked_in_order(self) -> Group:
        names = [projection.name for projection in self.projections]
        if names != [name for name in GROUPS[self.group] if name in names]:
            raise ValueError(f"group {self.group} cannot hold {', '.join(names)} in this order")
        offset = 0
        for projection in self.projections:
            if projection.row_offset != offset:
                raise ValueError(f"{projection.name} must begin at row {offset}")
            offset += projection.rank
        if offset > MAX_ROWS:
            raise ValueError(f"a group has at most {MAX_ROWS} rows")
        if len(set(self.plans)) != len(self.plans):
            raise ValueError("a plan occurs twice")
        return self


class MoaiContract(_Strict):
    """What the evaluation may use: no rotation, no evaluation key, only these groups under these plans."""

    parameter_set: Name
    mode: Mode
    """Whether the host gets a basis U for each projection, or (full) nothing but deltas."""
    rotations: Literal[0]
    evaluation_keys: Literal[0]
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=4096)]
    total_variation_log2: Annotated[int, Field(ge=-256, le=0)]
    """log2, rounded up, of the statistical distance over all that `token_budget` tokens return."""
    privacy_bound_log2: Annotated[int, Field(ge=-256, le=0)]
    """The limit it was packed under."""

    @model_validator(mode="after")
    def _groups_are_in_order(self) -> MoaiContract:
        order = list(GROUPS)
        keys = [(group.layer, order.index(group.group)) for group in self.groups]
        if keys != sorted(set(keys)):
            raise ValueError("groups must be in order of layer and kind, each once")
        for projection in (projection for group in self.groups for projection in group.projections):
            if self.mode == "full" and projection.rank != projection.d_out:
                raise ValueError(f"in full mode the rank of {projection.name} is its d_out")
            if self.mode == "factored" and projection.rank > MAX_RANK:
                raise ValueError(f"in factored mode a projection has at most rank {MAX_RANK}")
        return self


class Part(_Strict):
    """One encrypted part. The offset counts from the end of the signatures."""

    name: Name
    role: PartRole
    offset: Annotated[int, Field(ge=0, le=2 * MAX_PART_BYTES)]
    size: Annotated[int, Field(ge=1, le=MAX_PART_BYTES)]
    sha256: Sha256
    """Of the ciphertext."""


class Manifest(_Strict):
    """Everything public about a package. Signed; the content key is released for its SHA-256."""

    version: Literal[1]
    tenant: Name
    package_id: Name
    sequence: Annotated[int, Field(ge=1, le=MAX_SEQUENCE)]
    created: UnixSeconds
    expires: UnixSeconds
    key_id: KeyId
    token_budget: Annotated[int, Field(ge=1, le=2**53 - 1)]
    """Tokens that all holders of the key together may serve."""
    release_policy: ReleasePolicy | None
    """None leaves the choice to the attestor that holds the key."""
    base_model: BaseModelReference
    peft: PeftSummary
    moai: MoaiContract
    parts: Annotated[tuple[Part, ...], Field(min_length=1, max_length=2)]

    @model_validator(mode="after")
    def _parts_are_contiguous(self) -> Manifest:
        if self.expires <= self.created:
            raise ValueError("the package expires before it was created")
        if [part.role for part in self.parts] != ["weights", "basis"][: 1 if self.moai.mode == "full" else 2]:
            raise ValueError("a package has a weights part and then, unless its mode is full, a basis part")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError("two parts have the same name")
        offset = 0
        for part in self.parts:
            if part.offset != offset:
                raise ValueError(f"part {part.name} must begin at offset {offset}")
            offset += part.size
        return self

    def part(self, role: PartRole) -> Part:
        """The part that plays a role."""
        return next(part for part in self.parts if part.role == role)

    def to_bytes(self) -> bytes:
        """The canonical bytes that are signed and hashed."""
        return canonical.dumps(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_manifest(data: bytes) -> Manifest:
    """Parse canonical manifest bytes. Raises PackageError naming each field that is wrong."""
    try:
        canonical.loads(data, MAX_MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(data)
    except InvalidInputError as error:
        raise PackageError(f"the manifest is malformed: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'manifest'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)[:5]
        )
        raise PackageError(f"the manifest is not allowed: {problems}") from None
    if manifest.to_bytes() != data:
        raise PackageError("the manifest is malformed: it is not in the form this version writes")
    return manifest
