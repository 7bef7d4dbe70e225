"""The verifier of RFC 9334: from a challenge and evidence to an attestation result, or a refusal."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.attestor.decisions import decision
from services.attestor.nonces import NonceStore
from tensorguard.errors import ConfigurationError, EvidenceRefusedError, InvalidInputError
from tensorguard.evidence.appraisal import appraisal_of, require_evidence_kind
from tensorguard.evidence.audit import AuditLog
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.ear import IssuedToken, issue_token
from tensorguard.evidence.endorsements import EndorsementDirectory
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.report_data import binding
from tensorguard.package.names import check_name

MAX_EVIDENCE_BYTES = 64 * 1024
MAX_ENDORSEMENTS = 16
MAX_ENDORSEMENTS_BYTES = 128 * 1024
MAX_TLS_KEY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class AttestationRequest:
    """What a workload sends to be attested."""

    nonce: bytes
    evidence_kind: str
    evidence: bytes
    endorsements: tuple[bytes, ...]
    identity: PublicIdentity
    tls_key: bytes
    tenant: str
    role: Role
    package_id: str


class Appraiser:
    """Appraises evidence under one policy."""

    def __init__(
        self,
        key: AttestorKey,
        policy: Policy,
        verifiers: Mapping[EvidenceKind, EvidenceVerifier],
        nonces: NonceStore,
        audit: AuditLog,
        *,
        endorsements: EndorsementDirectory | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigurationError when the policy names a kind of evidence without a verifier."""
        missing = sorted(kind.value for kind in policy.evidence_kinds if kind not in verifiers)
        if missing:
            raise ConfigurationError(
                f"policy {policy.id!r} names evidence that this attestor cannot check: {', '.join(missing)}; "
                "configure its verifier (for simulated: the root's public key) or take it out of the policy"
            )
        self._key = key
        self._policy = policy
        self._verifiers = verifiers
        self._nonces = nonces
        self._audit = audit
        self._endorsements = endorsements if endorsements is not None else EndorsementDirectory(None)
        self._clock = clock

    def attest(self, request: AttestationRequest) -> IssuedToken:
        """A token for the workload. Raises NonceError, InvalidInputError or EvidenceRefusedError."""
        with decision(self._audit, "attest") as record:
            record.update(
                policy_sha256=self._policy.sha256,
                evidence_kind=request.evidence_kind,
                evidence_sha256=hashlib.sha256(request.evidence).hexdigest(),
                nonce_sha256=hashlib.sha256(request.nonce).hexdigest(),
                tenant=request.tenant,
                role=request.role.value,
                package_id=request.package_id,
            )
            # Before anything else is looked at: a nonce is good for one attempt, not for one success.
            self._nonces.consume(request.nonce)
            issued = self._appraise(request)
            record.update(holder=request.identity.thumbprint, jti=issued.token_id)
        return issued

    def _appraise(self, request: AttestationRequest) -> IssuedToken:
        _check_bounds(request)
        try:
            kind = EvidenceKind(request.evidence_kind)
        except ValueError:
            raise EvidenceRefusedError("this kind of evidence is not known", "evidence_kind_not_allowed") from None
        require_evidence_kind(self._policy, kind)
        now = self._clock()
        expected = binding(
            request.nonce,
            request.identity,
            attestor_thumbprint=self._key.thumbprint,
            tenant=request.tenant,
            role=request.role,
            package_id=request.package_id,
            tls_key=request.tls_key,
        )
        checks = appraisal_of(self._policy, tenant=request.tenant, role=request.role, binding=expected, now=now)
        endorsements = (*self._endorsements.of(kind), *request.endorsements)
        claims = self._verifiers[kind].verify(request.evidence, endorsements, at=now)
        checks.verify(claims)
        return issue_token(
            self._key,
            self._policy,
            claims,
            request.identity,
            tenant=request.tenant,
            role=request.role,
            package_id=request.package_id,
            tls_key_sha256=hashlib.sha256(request.tls_key).hexdigest() if request.tls_key else "",
            nonce=request.nonce,
            now=now,
        )


def _check_bounds(request: AttestationRequest) -> None:
    if not 0 < len(request.evidence) <= MAX_EVIDENCE_BYTES:
        raise InvalidInputError(f"evidence must have 1 to {MAX_EVIDENCE_BYTES} bytes")
    if len(request.endorsements) > MAX_ENDORSEMENTS or sum(map(len, request.endorsements)) > MAX_ENDORSEMENTS_BYTES:
        raise InvalidInputError(f"at most {MAX_ENDORSEMENTS} endorsements with {MAX_ENDORSEMENTS_BYTES} bytes in all")
    if len(request.tls_key) > MAX_TLS_KEY_BYTES:
        raise InvalidInputError(f"a TLS key must have at most {MAX_TLS_KEY_BYTES} bytes")
    request.identity.validate()
    check_name(request.tenant, "tenant")
    if request.package_id:
        check_name(request.package_id, "package id")
