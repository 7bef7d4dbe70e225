"""Conditions on TDX claims: one small check each, composed by `tdx_checks` from a policy's section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.checks import AppraisalCheck
from tensorguard.evidence.claims import Claims
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tensorguard.evidence.tdx.policy import TdxPolicy


def tdx_checks(policy: TdxPolicy) -> list[AppraisalCheck]:
    """The checks of a policy's section, the platform's health before its identity."""
    return [
        AllowedTcbStatus(policy.tcb_statuses),
        NoDeniedAdvisory(policy.denied_advisories),
        MinTcbEvalDataNumber(policy.min_tcb_eval_data_number),
        AllowedPlatformFlag("dynamic_platform", policy.allow_dynamic_platform),
        AllowedPlatformFlag("cached_keys", policy.allow_cached_keys),
        AllowedPlatformFlag("smt_enabled", policy.allow_smt),
        AllowedMachine(None if policy.machines == "any" else policy.machines),
        AllowedFmspc(policy.fmspcs),
        AllowedTdAttributes(policy.td_attributes),
        AllowedXfam(policy.xfams),
    ]


def _details(claims: Claims) -> TdxClaims:
    if not isinstance(claims.details, TdxClaims):
        raise EvidenceRefusedError("the claims are not of a TDX quote", "malformed")
    return claims.details


@dataclass(frozen=True, slots=True)
class AllowedTcbStatus:
    """Intel's judgement of the platform is one that the policy lists. A revoked platform never passes."""

    statuses: Sequence[TcbStatus]

    def verify(self, claims: Claims) -> None:
        status = _details(claims).tcb_status
        if status is TcbStatus.REVOKED or status not in self.statuses:
            raise EvidenceRefusedError(
                f"the platform's TCB status is {status.value}, which the policy does not allow; update the "
                "machine's firmware, or add the status to tdx.tcb_statuses",
                "tcb_status_not_allowed",
            )


@dataclass(frozen=True, slots=True)
class NoDeniedAdvisory:
    """No advisory that the policy denies concerns the platform."""

    denied: Sequence[str]

    def verify(self, claims: Claims) -> None:
        found = sorted({name.upper() for name in _details(claims).advisory_ids} & set(self.denied))
        if found:
            raise EvidenceRefusedError(
                f"the policy denies platforms that {', '.join(found)} concerns; update the machine's firmware",
                "advisory_denied",
            )


@dataclass(frozen=True, slots=True)
class MinTcbEvalDataNumber:
    """The collateral is of this TCB recovery or of a later one."""

    minimum: int

    def verify(self, claims: Claims) -> None:
        number = _details(claims).tcb_eval_data_number
        if number < self.minimum:
            raise EvidenceRefusedError(
                f"the collateral's TCB evaluation data number is {number}, the policy wants {self.minimum} or more; "
                "get newer collateral",
                "tcb_eval_data_number",
            )


@dataclass(frozen=True, slots=True)
class AllowedPlatformFlag:
    """A property of the platform's configuration is allowed, or its certificate says that it is off."""

    flag: str
    """A field of TdxClaims."""
    allowed: bool

    def verify(self, claims: Claims) -> None:
        value = getattr(_details(claims), self.flag)
        if not self.allowed and value is not False:
            said = "is on" if value else "is not mentioned in its certificate"
            field = f"allow_{self.flag.removesuffix('_enabled')}"
            raise EvidenceRefusedError(
                f"{self.flag} of the platform {said}, and the policy says tdx.{field}: false",
                f"{self.flag}_not_allowed",
            )


@dataclass(frozen=True, slots=True)
class AllowedMachine:
    """The platform is one of these machines. None: any."""

    ppids: Sequence[str] | None

    def verify(self, claims: Claims) -> None:
        ppid = _details(claims).ppid
        if self.ppids is not None and ppid not in self.ppids:
            raise EvidenceRefusedError(
                f"the machine with PPID {ppid} is not in the policy's tdx.machines", "machine_not_allowed"
            )


@dataclass(frozen=True, slots=True)
class AllowedFmspc:
    """The platform is of one of these families. None: any."""

    fmspcs: Sequence[str] | None

    def verify(self, claims: Claims) -> None:
        fmspc = _details(claims).fmspc
        if self.fmspcs is not None and fmspc not in self.fmspcs:
            raise EvidenceRefusedError(
                f"the platform family (FMSPC) {fmspc} is not in the policy's tdx.fmspcs", "fmspc_not_allowed"
            )


@dataclass(frozen=True, slots=True)
class AllowedTdAttributes:
    """The trust domain was started with exactly one of these sets of attributes."""

    values: Sequence[str]

    def verify(self, claims: Claims) -> None:
        attributes = _details(claims).td_attributes
        if attributes not in self.values:
            raise EvidenceRefusedError(
                f"the TD attributes are {attributes}, which is not in the policy's tdx.td_attributes",
                "td_attributes_not_allowed",
            )


@dataclass(frozen=True, slots=True)
class AllowedXfam:
    """The trust domain may use exactly one of these sets of processor features. None: any."""

    values: Sequence[str] | None

    def verify(self, claims: Claims) -> None:
        xfam = _details(claims).xfam
        if self.values is not None and xfam not in self.values:
            raise EvidenceRefusedError(
                f"the XFAM is {xfam}, which is not in the policy's tdx.xfams", "xfam_not_allowed"
            )
