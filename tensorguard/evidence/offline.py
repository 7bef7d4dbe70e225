"""Appraisal without a server and without an exchange: evidence from a file, a policy, and a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.appraisal import evidence_appraisal, require_evidence_kind
from tensorguard.evidence.checks import AppraisalCheck, ExpectedNonce, ExpectedReportData, ExpectedRole, Fresh
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.policy import MeasurementTuple, Policy


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """What is to be appraised. Tenant and lease of the policy have no part in it: nothing is released."""

    kind: EvidenceKind
    evidence: bytes
    policy: Policy
    at: float
    """Unix seconds."""
    endorsements: Sequence[bytes] = ()
    role: Role | None = None
    """None: the measurements of any role of the policy will do."""
    nonce: bytes | None = None
    report_data: bytes | None = None


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """The decision. No refusals: accepted."""

    claims: Claims | None
    """None when the evidence is not authentic."""
    refusals: tuple[EvidenceRefusedError, ...]
    """Of every check that does not hold, the decisive one first."""

    @property
    def accepted(self) -> bool:
        return self.claims is not None and not self.refusals


def appraise_offline(request: OfflineRequest, verifier: EvidenceVerifier) -> OfflineResult:
    """Verify and appraise. Refusals are in the result; other errors are raised."""
    claims: Claims | None = None
    try:
        require_evidence_kind(request.policy, request.kind)
        appraisal = evidence_appraisal(request.policy, exchange=_exchange(request), measurements=_measurements(request))
        claims = verifier.verify(request.evidence, request.endorsements, at=request.at)
    except EvidenceRefusedError as refused:
        return OfflineResult(claims, (refused,))
    return OfflineResult(claims, tuple(appraisal.refusals(claims)))


def _exchange(request: OfflineRequest) -> list[AppraisalCheck]:
    checks: list[AppraisalCheck] = [Fresh(request.at)]
    if request.report_data is not None:
        checks.append(ExpectedReportData(request.report_data))
    if request.nonce is not None:
        checks.append(ExpectedNonce(request.nonce))
    if request.role is not None:
        checks.append(ExpectedRole(request.role))
    return checks


def _measurements(request: OfflineRequest) -> list[MeasurementTuple]:
    roles = request.policy.roles
    if request.role is None:
        return [entry for rules in roles.values() for entry in rules.measurements]
    if request.role not in roles:
        raise EvidenceRefusedError(
            f"policy {request.policy.id!r} has no measurements for role {request.role.value!r}", "role_not_allowed"
        )
    return roles[request.role].measurements
