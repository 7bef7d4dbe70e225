"""What a host has of an attached adapter: the public manifest and, unless its mode is full, the bases U, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.plan import Plan
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import InvalidInputError, PackageError
from tensorguard.package.contract import check_contract, group_plans
from tensorguard.package.envelope import verify_envelope
from tensorguard.package.manifest import Manifest
from tensorguard.package.parts import decode_basis
from tensorguard.package.release_policy import check_release_policy
from tensorguard.session.handshake import HostHandshake

Basis = Mapping[tuple[int, str], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class GroupShape:
    """What the host needs to encrypt for one group and to read the result."""

    layer: int
    group: str
    d_in: int
    rows: int
    norm_bound: float
    plans: tuple[Plan, ...]
    row_scales: npt.NDArray[np.float64]
    """float64 [rows]"""


@dataclass(frozen=True, slots=True, eq=False)
class AttachedAdapter:
    """Stays valid across reconnects: the session checks that the same release is attached again."""

    name: str
    digest: str
    """SHA-256 of the manifest, hex."""
    sequence: int
    manifest: Manifest
    """The verified manifest (public)."""
    basis: Basis
    """(layer, projection) -> U, float32 [d_out, rank]; empty in full mode, where z is the delta."""
    groups: Mapping[tuple[int, str], GroupShape]

    def shape(self, layer: int, group: str) -> GroupShape:
        """Raises InvalidInputError when the adapter has nothing for this group."""
        try:
            return self.groups[layer, group]
        except KeyError:
            raise InvalidInputError(f"adapter {self.name} has no {group} group in layer {layer}") from None

    def __repr__(self) -> str:
        return f"AttachedAdapter({self.name}, sequence={self.sequence})"


def open_adapter(
    handshake: HostHandshake,
    name: str,
    envelope: bytes,
    sealed_basis: bytes,
    verify_keys: Sequence[VerifyingKeys],
) -> AttachedAdapter:
    """Check an attached adapter's manifest and open its basis.

    The manifest must be signed by one of `verify_keys`, and name no other policy than the coprocessor was attested
    under. Raises PackageError, PackageTamperedError, PrivacyBoundError or AuthenticationError.
    """
    opened = verify_envelope(envelope, verify_keys)
    manifest = opened.manifest
    if (manifest.package_id, manifest.tenant) != (name, handshake.transcript.tenant):
        raise PackageError(f"the coprocessor answered with another adapter than {name}")
    check_release_policy(manifest, handshake.peer.policy_sha256)
    if check_contract(manifest) != handshake.parameters:
        raise PackageError(
            f"adapter {name} needs parameter set {manifest.moai.parameter_set}: open the session with it"
        )
    basis = decode_basis(manifest, handshake.open_basis(sealed_basis, name, opened.digest))
    groups: dict[tuple[int, str], GroupShape] = {
        (group.layer, group.group): GroupShape(
            layer=group.layer,
            group=group.group,
            d_in=group.d_in,
            rows=group.rows,
            norm_bound=group.norm_bound,
            plans=group_plans(group, handshake.parameters),
            row_scales=np.exp2(-np.asarray(group.scale_exponents, np.float64)),
        )
        for group in manifest.moai.groups
    }
    return AttachedAdapter(name, opened.digest, manifest.sequence, manifest, basis, groups)
