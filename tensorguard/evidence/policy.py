"""The policy that evidence is appraised by: a strict, versioned document (YAML or JSON).

Whatever a policy does not name is refused: unknown fields, empty lists and aliases make the policy itself
invalid, so that a misspelt restriction can never become a missing one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from tensorguard.crypto import canonical
from tensorguard.errors import PolicyError
from tensorguard.evidence.claims import REQUIRED_MEASUREMENTS, EvidenceKind, Role
from tensorguard.evidence.nitro.policy import NitroPolicy
from tensorguard.evidence.nvidia.policy import GpuPolicy
from tensorguard.evidence.snp.policy import SnpPolicy
from tensorguard.evidence.strict import Strict
from tensorguard.evidence.tdx.policy import TdxPolicy

MAX_POLICY_BYTES = 256 * 1024
MAX_TOKEN_LIFE_SECONDS = 300
KINDS_WITH_SECTION = (EvidenceKind.TDX, EvidenceKind.SNP, EvidenceKind.NITRO)
"""Kinds whose platforms a policy must say something about, under the kind's own name."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$", max_length=64)]
Register = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2}){32,64}$")]


class MeasurementTuple(Strict):
    """Registers that must all match together. Tuples are never mixed."""

    evidence_kind: Annotated[EvidenceKind, Field(strict=False)]
    values: Annotated[dict[Register, Digest], Field(min_length=1)]
    note: Annotated[str, StringConstraints(max_length=200)] = ""

    @model_validator(mode="after")
    def _names_the_code(self) -> MeasurementTuple:
        missing = REQUIRED_MEASUREMENTS[self.evidence_kind] - self.values.keys()
        if missing:
            raise ValueError(f"a {self.evidence_kind.value} tuple must name {', '.join(sorted(missing))}")
        return self


class RolePolicy(Strict):
    """What may play one role."""

    measurements: Annotated[list[MeasurementTuple], Field(min_length=1, max_length=256)]
    gpu: GpuPolicy | None = None
    """What its GPUs must be, for an inference host; None: they are not asked about."""


class LeaseLimits(Strict):
    """How long and how many tokens a released key is good for before it must be renewed."""

    seconds: Annotated[int, Field(ge=1, le=24 * 3600)]
    tokens_per_grant: Annotated[int, Field(ge=1, le=2**40)]
    tokens_per_release: Annotated[int, Field(ge=1, le=2**53 - 1)]
    """Upper limit on what all leases of one adapter release may serve; a package may ask for less."""


class Policy(Strict):
    """One version of what an attestor accepts."""

    version: Literal[1]
    id: Name
    evidence_kinds: Annotated[list[Annotated[EvidenceKind, Field(strict=False)]], Field(min_length=1)]
    tenants: Annotated[list[Name], Field(min_length=1, max_length=1024)]
    roles: Annotated[dict[Annotated[Role, Field(strict=False)], RolePolicy], Field(min_length=1)]
    lease: LeaseLimits
    token_life_seconds: Annotated[int, Field(ge=1, le=MAX_TOKEN_LIFE_SECONDS)] = MAX_TOKEN_LIFE_SECONDS
    allow_debug: bool = False
    allow_x25519: bool = False
    """Whether content keys may be sealed to a workload that has an X25519 key alone, without ML-KEM."""
    tdx: TdxPolicy | None = None
    snp: SnpPolicy | None = None
    nitro: NitroPolicy | None = None

    @model_validator(mode="after")
    def _sections_are_those_of_the_kinds(self) -> Policy:
        for kind in KINDS_WITH_SECTION:
            named, section = kind in self.evidence_kinds, getattr(self, kind.value)
            if named and section is None:
                raise ValueError(f"evidence_kinds names {kind.value}: say in a section {kind.value!r} what it must be")
            if section is not None and not named:
                raise ValueError(f"there is a section {kind.value!r}, but evidence_kinds does not name that kind")
        return self

    @model_validator(mode="after")
    def _tuples_are_usable(self) -> Policy:
        for role, rules in self.roles.items():
            if rules.gpu is not None and role is not Role.INFERENCE:
                raise ValueError(f"roles.{role.value} has a section 'gpu', but only an inference host has GPUs")
            for entry in rules.measurements:
                if entry.evidence_kind not in self.evidence_kinds:
                    raise ValueError(
                        f"roles.{role.value} lists {entry.evidence_kind.value} measurements, "
                        "but evidence_kinds does not name that kind"
                    )
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the canonical policy: independent of layout, comments and the order of fields."""
        return hashlib.sha256(canonical.dumps(self.model_dump(mode="json"))).hexdigest()


def parse_policy(text: bytes | str) -> Policy:
    """A policy from YAML or JSON text of at most 256 KiB. Raises PolicyError naming each wrong field."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_POLICY_BYTES:
        raise PolicyError(f"the policy is larger than {MAX_POLICY_BYTES} bytes")
    try:
        document = yaml.load(data.decode("utf-8"), Loader=_PolicyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PolicyError(f"the policy is neither YAML nor JSON: {_one_line(error)}") from None
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'policy'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise PolicyError(f"the policy is refused: {problems}") from None


def policy_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a policy. Some rules between fields are only in the code: `tensafe policy lint`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


def load_policy(path: Path) -> Policy:
    """The policy in a file. Raises PolicyError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"cannot read policy {path}: {error.strerror or error}") from None
    return parse_policy(data)


class _PolicyLoader(yaml.SafeLoader):
    """YAML without aliases (they can blow a small file up) and without repeated keys (the last would win)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a policy")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"field {key!r} occurs twice")
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
