"""Appraisal: a policy's small checks over typed claims, composed into its decision (RFC 9334, 8.3)."""

from __future__ import annotations

from collections.abc import Sequence

from tensorguard.crypto.hpke import HpkeSuite
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.checks import (
    AllOf,
    AllowedKind,
    AllowedMeasurement,
    AppraisalCheck,
    ExpectedReportData,
    ExpectedRole,
    ForKind,
    Fresh,
    NotDebuggable,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.nitro.checks import nitro_checks, nitro_exchange_checks
from tensorguard.evidence.policy import MeasurementTuple, Policy
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.snp.checks import snp_checks
from tensorguard.evidence.tdx.checks import tdx_checks


def require_evidence_kind(policy: Policy, kind: EvidenceKind) -> None:
    """Raises EvidenceRefusedError unless the policy names `kind`. Asked before evidence is parsed."""
    if kind not in policy.evidence_kinds:
        raise EvidenceRefusedError(
            f"policy {policy.id!r} does not name evidence of kind {kind.value!r}", "evidence_kind_not_allowed"
        )


def require_hpke_suite(policy: Policy, suite: HpkeSuite) -> None:
    """Raises EvidenceRefusedError unless the policy lets content keys be sealed with `suite`."""
    if suite is HpkeSuite.X25519 and not policy.allow_x25519:
        raise EvidenceRefusedError(
            f"the workload has an X25519 key alone, and policy {policy.id!r} does not allow that: use MLKEM768-X25519, "
            "or set allow_x25519 in the policy",
            "hpke_suite_not_allowed",
        )


def appraisal_of(policy: Policy, *, tenant: str, role: Role, binding: Binding, now: float) -> AllOf:
    """The checks that `policy` asks of evidence for `tenant` and `role`.

    Raises EvidenceRefusedError when the policy has nothing for that tenant or role.
    """
    if tenant not in policy.tenants:
        raise EvidenceRefusedError(f"policy {policy.id!r} does not name this tenant", "tenant_not_allowed")
    rules = policy.roles.get(role)
    if rules is None:
        raise EvidenceRefusedError(
            f"policy {policy.id!r} has no measurements for role {role.value!r}", "role_not_allowed"
        )
    nitro = nitro_exchange_checks(binding.nonce, binding.public_key)
    exchange: list[AppraisalCheck] = [
        *(ForKind(EvidenceKind.NITRO, check) for check in nitro),
        ExpectedReportData(binding.report_data),
        Fresh(now),
        ExpectedRole(role),
    ]
    return evidence_appraisal(policy, exchange=exchange, measurements=rules.measurements)


def evidence_appraisal(
    policy: Policy, *, exchange: Sequence[AppraisalCheck], measurements: Sequence[MeasurementTuple]
) -> AllOf:
    """The checks that `policy` asks of evidence whoever it is from.

    `exchange`: what ties the evidence to one exchange. In the order of the questions: is it debuggable, is it this
    exchange, is it a platform that is good enough, is it allowed code.
    """
    checks: list[AppraisalCheck] = [] if policy.allow_debug else [NotDebuggable()]
    checks += [*exchange, AllowedKind(policy.evidence_kinds)]
    if policy.tdx is not None:
        checks += [ForKind(EvidenceKind.TDX, check) for check in tdx_checks(policy.tdx)]
    if policy.snp is not None:
        checks += [ForKind(EvidenceKind.SNP, check) for check in snp_checks(policy.snp)]
    if policy.nitro is not None:
        checks += [ForKind(EvidenceKind.NITRO, check) for check in nitro_checks(policy.nitro)]
    return AllOf((*checks, AllowedMeasurement(measurements)))
