"""Appraisal checks: one small condition each, on typed claims, whichever the platform (RFC 9334, 8.3)."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.policy import MeasurementTuple

MAX_AGE_SECONDS = 300


class AppraisalCheck(Protocol):
    """One condition on claims."""

    def verify(self, claims: Claims) -> None:
        """Raises EvidenceRefusedError, with `detail` for programs, when the condition does not hold."""


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every check holds; the first that does not gives the reason."""

    checks: Sequence[AppraisalCheck]

    def verify(self, claims: Claims) -> None:
        for refused in self.refusals(claims):
            raise refused

    def refusals(self, claims: Claims) -> Iterator[EvidenceRefusedError]:
        """Of every check that does not hold, in order."""
        if not self.checks:
            yield EvidenceRefusedError("no checks are configured, so nothing is accepted", "no_checks")
        for check in self.checks:
            try:
                check.verify(claims)
            except EvidenceRefusedError as refused:
                yield refused


@dataclass(frozen=True, slots=True)
class ForKind:
    """A condition that only evidence of one kind can be asked for."""

    kind: EvidenceKind
    check: AppraisalCheck

    def verify(self, claims: Claims) -> None:
        if claims.kind is self.kind:
            self.check.verify(claims)


@dataclass(frozen=True, slots=True)
class NotDebuggable:
    """The platform hides the workload from its operator."""

    def verify(self, claims: Claims) -> None:
        if claims.debug:
            raise EvidenceRefusedError("the platform is in debug mode; start the workload without it", "debug_enabled")


@dataclass(frozen=True, slots=True)
class ExpectedReportData:
    """The evidence answers this challenge, for these keys and this purpose."""

    report_data: bytes

    def verify(self, claims: Claims) -> None:
        if not hmac.compare_digest(claims.report_data, self.report_data):
            raise EvidenceRefusedError(
                "the evidence is bound to another nonce, key, attestor, tenant, role or package",
                "report_data_mismatch",
            )


@dataclass(frozen=True, slots=True)
class ExpectedNonce:
    """The evidence answers this challenge: in its own field where its kind has one, else as its report data.

    Report data are the nonce then, filled up with zeros. Our own exchange binds more than a nonce (ExpectedReportData).
    """

    nonce: bytes

    def verify(self, claims: Claims) -> None:
        actual, expected = claims.nonce, self.nonce
        if actual is None:
            actual, expected = claims.report_data, self.nonce.ljust(len(claims.report_data), b"\0")
        if not hmac.compare_digest(actual, expected):
            raise EvidenceRefusedError("the evidence answers another challenge", "nonce_mismatch")


@dataclass(frozen=True, slots=True)
class Fresh:
    """The platform's own time, where it has one, is near the verifier's."""

    now: float
    max_age: float = MAX_AGE_SECONDS

    def verify(self, claims: Claims) -> None:
        if claims.issued_at is not None and abs(self.now - claims.issued_at) > self.max_age:
            raise EvidenceRefusedError(
                f"the evidence is not from the last {self.max_age:g} seconds; check both machines' clocks",
                "evidence_time",
            )


@dataclass(frozen=True, slots=True)
class AllowedKind:
    """The kind of evidence is named by the policy."""

    kinds: Sequence[EvidenceKind]

    def verify(self, claims: Claims) -> None:
        if claims.kind not in self.kinds:
            raise EvidenceRefusedError(
                f"the policy does not name evidence of kind {claims.kind.value!r}",
                "evidence_kind_not_allowed",
            )


@dataclass(frozen=True, slots=True)
class ExpectedRole:
    """Evidence that names a role names the one asked for."""

    role: Role

    def verify(self, claims: Claims) -> None:
        if claims.role is not None and claims.role is not self.role:
            raise EvidenceRefusedError(
                f"the evidence is for role {claims.role.value!r}, not {self.role.value!r}", "role_mismatch"
            )


@dataclass(frozen=True, slots=True)
class AllowedMeasurement:
    """All registers of one listed tuple match; parts of different tuples never add up."""

    tuples: Sequence[MeasurementTuple]

    def verify(self, claims: Claims) -> None:
        for entry in self.tuples:
            if entry.evidence_kind is claims.kind and all(
                claims.measurements.get(register) == value for register, value in entry.values.items()
            ):
                return
        raise EvidenceRefusedError(
            "no measurement tuple of the policy matches the code that is running; add the new measurement to "
            "the policy or run the code it names",
            "measurement_not_allowed",
        )
