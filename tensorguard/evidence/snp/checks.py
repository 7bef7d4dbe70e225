"""Conditions on SEV-SNP claims: one small check each, composed by `snp_checks` from a policy's section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.checks import AppraisalCheck
from tensorguard.evidence.claims import Claims
from tensorguard.evidence.snp.claims import SigningKey, SnpClaims
from tensorguard.evidence.snp.policy import SnpPolicy, TcbFloors
from tensorguard.evidence.snp.product import Product, TcbVersion


def snp_checks(policy: SnpPolicy) -> list[AppraisalCheck]:
    """The checks of a policy's section: who signed, how the guest is protected, how new the machine is, which it is."""
    return [
        AllowedSigningKey(policy.signing_keys, policy.csp_ids or ()),
        AllowedVmpl(policy.vmpls),
        AllowedGuestPolicy("migration_agent", policy.allow_migration_agent, "migration_agent"),
        AllowedGuestPolicy("smt", policy.allow_smt, "smt_not_allowed"),
        AllowedGuestPolicy("cxl", policy.allow_cxl, "cxl_not_allowed"),
        RequiredGuestPolicy(policy.required_guest_policy),
        RequiredPlatform(policy.required_platform),
        MinimumAbi(policy.minimum_abi.major, policy.minimum_abi.minor),
        MinimumGuestSvn(policy.minimum_guest_svn),
        TcbAtLeast(policy.tcb_floors),
        AllowedChip(None if policy.chip_ids == "any" else policy.chip_ids),
        NotRevokedChip(policy.revoked_chip_ids),
        *([RevocationListChecked()] if policy.require_crl else []),
    ]


def _details(claims: Claims) -> SnpClaims:
    if not isinstance(claims.details, SnpClaims):
        raise EvidenceRefusedError("the claims are not of an SEV-SNP report", "malformed")
    return claims.details


@dataclass(frozen=True, slots=True)
class AllowedSigningKey:
    """The report is signed by a key of a listed kind, and a VLEK is of a listed provider."""

    keys: Sequence[SigningKey]
    csp_ids: Sequence[str]

    def verify(self, claims: Claims) -> None:
        details = _details(claims)
        if details.signing_key not in self.keys:
            raise EvidenceRefusedError(
                f"a {details.signing_key.value.upper()} signed the report, which is not in the policy's "
                "snp.signing_keys",
                "signing_key_not_allowed",
            )
        if details.signing_key is SigningKey.VLEK and details.csp_id not in self.csp_ids:
            raise EvidenceRefusedError(
                f"the VLEK is of {details.csp_id!r}, which is not in the policy's snp.csp_ids", "csp_not_allowed"
            )


@dataclass(frozen=True, slots=True)
class AllowedVmpl:
    """Code at a listed privilege level of the guest asked for the report."""

    vmpls: Sequence[int]

    def verify(self, claims: Claims) -> None:
        vmpl = _details(claims).vmpl
        if vmpl not in self.vmpls:
            raise EvidenceRefusedError(
                f"VMPL {vmpl} asked for the report, which is not in the policy's snp.vmpls", "vmpl_not_allowed"
            )


@dataclass(frozen=True, slots=True)
class AllowedGuestPolicy:
    """Something that weakens the guest is forbidden by its own policy, or allowed here."""

    flag: str
    """A field of GuestPolicy."""
    allowed: bool
    reason: str

    def verify(self, claims: Claims) -> None:
        if getattr(_details(claims).guest_policy, self.flag) and not self.allowed:
            raise EvidenceRefusedError(
                f"the guest was launched with a policy that permits {self.flag}, and snp.allow_{self.flag} is false",
                self.reason,
            )


@dataclass(frozen=True, slots=True)
class RequiredGuestPolicy:
    """The guest demands these features of every machine it runs on."""

    features: Sequence[str]
    """Fields of GuestPolicy."""

    def verify(self, claims: Claims) -> None:
        missing = [name for name in self.features if not getattr(_details(claims).guest_policy, name)]
        if missing:
            raise EvidenceRefusedError(
                f"the guest was launched with a policy that does not demand {', '.join(missing)}", "guest_policy"
            )


@dataclass(frozen=True, slots=True)
class RequiredPlatform:
    """The machine has these features on."""

    features: Sequence[str]
    """Fields of PlatformInfo."""

    def verify(self, claims: Claims) -> None:
        missing = [name for name in self.features if not getattr(_details(claims).platform, name)]
        if missing:
            raise EvidenceRefusedError(
                f"the machine does not have {', '.join(missing)}; turn it on in its firmware", "platform_feature"
            )


@dataclass(frozen=True, slots=True)
class MinimumAbi:
    """The guest demands at least this version of the firmware interface."""

    major: int
    minor: int

    def verify(self, claims: Claims) -> None:
        guest = _details(claims).guest_policy
        if (guest.abi_major, guest.abi_minor) < (self.major, self.minor):
            raise EvidenceRefusedError(
                f"the guest runs from firmware interface {guest.abi_major}.{guest.abi_minor} on, the policy wants "
                f"it to demand {self.major}.{self.minor} or later",
                "abi_below_minimum",
            )


@dataclass(frozen=True, slots=True)
class MinimumGuestSvn:
    """The guest's owner gave it at least this security version."""

    minimum: int

    def verify(self, claims: Claims) -> None:
        svn = _details(claims).guest_svn
        if svn < self.minimum:
            raise EvidenceRefusedError(
                f"the guest's security version is {svn}, the policy wants {self.minimum} or more", "guest_svn_too_low"
            )


@dataclass(frozen=True, slots=True)
class TcbAtLeast:
    """The processor is of a listed line, and every component of every TCB version reaches the floor for it."""

    floors: Mapping[Product, TcbFloors]

    def verify(self, claims: Claims) -> None:
        details = _details(claims)
        floors = self.floors.get(details.product)
        if floors is None:
            raise EvidenceRefusedError(
                f"the processor is a {details.product.label}, which the policy's snp.tcb_floors does not list",
                "product_not_allowed",
            )
        for name, version, floor in (
            ("reported", details.reported_tcb, floors.reported),
            ("current", details.current_tcb, floors.current),
            ("committed", details.committed_tcb, floors.committed),
            ("launch", details.launch_tcb, floors.launch),
        ):
            for component in (field.name for field in fields(TcbVersion)):
                actual, minimum = getattr(version, component), getattr(floor, component)
                if minimum is not None and (actual is None or actual < minimum):
                    raise EvidenceRefusedError(
                        f"{component} of the {name} TCB is {actual}, the policy wants {minimum} or more; update the "
                        "machine's firmware",
                        "tcb_below_floor",
                    )


@dataclass(frozen=True, slots=True)
class AllowedChip:
    """The chip is one of these. None: any."""

    chip_ids: Sequence[str] | None

    def verify(self, claims: Claims) -> None:
        chip_id = _details(claims).chip_id
        if self.chip_ids is not None and chip_id not in self.chip_ids:
            raise EvidenceRefusedError(
                f"chip {chip_id or '(masked)'} is not in the policy's snp.chip_ids", "chip_not_allowed"
            )


@dataclass(frozen=True, slots=True)
class NotRevokedChip:
    """The chip is none of these. Where there are any, it has to be known which it is."""

    chip_ids: Sequence[str]

    def verify(self, claims: Claims) -> None:
        chip_id = _details(claims).chip_id
        if self.chip_ids and chip_id is None:
            raise EvidenceRefusedError(
                "the chip id is masked, so the chip may be one of the policy's snp.revoked_chip_ids; turn MASK_CHIP_ID "
                "off on the machine",
                "chip_id_masked",
            )
        if chip_id in self.chip_ids:
            raise EvidenceRefusedError(f"chip {chip_id} is in the policy's snp.revoked_chip_ids", "chip_revoked")


@dataclass(frozen=True, slots=True)
class RevocationListChecked:
    """The chain was checked against AMD's revocation list."""

    def verify(self, claims: Claims) -> None:
        if _details(claims).crl_number is None:
            raise EvidenceRefusedError(
                "the policy requires AMD's revocation list and none was supplied; get it from "
                "https://kdsintf.amd.com/vcek/v1/PRODUCT/crl (vlek for a VLEK)",
                "collateral_missing",
            )
