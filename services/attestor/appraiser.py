"""The verifier of RFC 9334: from a challenge and evidence to an attestation result, or a refusal."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from services.attestor.certificates import CertificateIssuer
from services.attestor.decisions import Decision, Decisions
from tensorguard.errors import ConfigurationError, EvidenceRefusedError, InvalidInputError
from tensorguard.evidence.appraisal import appraisal_of, require_evidence_kind, require_hpke_suite
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.ear import IssuedToken, issue_token
from tensorguard.evidence.endorsements import EndorsementDirectory
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.nvidia.checks import appraise_gpus
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.nvidia.verifier import MAX_EVIDENCE_BYTES as MAX_GPU_EVIDENCE_BYTES
from tensorguard.evidence.nvidia.verifier import GpuVerifier
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.report_data import binding, gpu_nonce
from tensorguard.package.names import check_name
from tensorguard.rpc.certificates import ServiceName, public_key_info, read_request
from tensorguard.store.nonces import NonceStore
from tensorguard.store.revocations import check_package_not_revoked, check_workload_not_revoked, keep_attestation
from tensorguard.store.signing_keys import SigningKeys

MAX_EVIDENCE_BYTES = 64 * 1024
MAX_ENDORSEMENTS = 16
MAX_ENDORSEMENTS_BYTES = 128 * 1024
MAX_TLS_KEY_BYTES = 1024
MAX_THUMBPRINT = 64
CHIP_FIELDS = ("chip_id", "ppid")
"""What the claims of AMD and Intel evidence call the machine's id."""
_COLLATERAL_FIELDS = (
    "tcb_status",
    "tcb_eval_data_number",
    "collateral_issued_at",
    "collateral_expires_at",
    "crl_number",
    "certificate_expires_at",
)


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
    gpu_evidence: bytes = b""
    attestor_thumbprint: str = ""
    """Of the attestor's key in the report data; empty for the one that signs now."""
    certificate_request: bytes = b""


@dataclass(frozen=True, slots=True)
class Attested:
    """What an accepted workload gets."""

    token: str
    expires_at: int
    certificate: bytes
    """DER; empty where none was asked for."""


class Appraiser:
    """Appraises evidence under one policy."""

    def __init__(
        self,
        keys: SigningKeys,
        policy: Policy,
        verifiers: Mapping[EvidenceKind, EvidenceVerifier],
        nonces: NonceStore,
        decisions: Decisions,
        *,
        certificates: CertificateIssuer,
        endorsements: EndorsementDirectory | None = None,
        gpu_verifier: GpuVerifier | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigurationError when the policy names a kind of evidence without a verifier."""
        missing = sorted(kind.value for kind in policy.evidence_kinds if kind not in verifiers)
        if missing:
            raise ConfigurationError(
                f"policy {policy.id!r} names evidence that this attestor cannot check: {', '.join(missing)}; "
                "configure its verifier (for simulated: the root's public key) or take it out of the policy"
            )
        self._keys = keys
        self._policy = policy
        self._verifiers = verifiers
        self._nonces = nonces
        self._decisions = decisions
        self._certificates = certificates
        self._endorsements = endorsements if endorsements is not None else EndorsementDirectory(None, {})
        self._gpu_verifier = gpu_verifier if gpu_verifier is not None else GpuVerifier()
        self._clock = clock

    def attest(self, request: AttestationRequest, *, peer: str) -> Attested:
        """A token for the workload, and a certificate where it asks for one, which ends with the token.

        Raises NonceError, InvalidInputError, EvidenceRefusedError or RevokedError.
        """
        with self._decisions.deciding("attest", peer) as record:
            record.update(
                policy_sha256=self._policy.sha256,
                evidence_kind=request.evidence_kind,
                evidence_sha256=hashlib.sha256(request.evidence).hexdigest(),
                nonce_sha256=hashlib.sha256(request.nonce).hexdigest(),
                tenant=request.tenant,
                role=request.role.value,
                package_id=request.package_id,
            )
            if request.gpu_evidence:
                record.update(gpu_evidence_sha256=hashlib.sha256(request.gpu_evidence).hexdigest())
            # Before anything else is looked at: a nonce is good for one attempt, not for one success.
            self._nonces.consume(request.nonce)
            claims, gpus, now = self._appraise(request)
            issued = issue_token(
                self._keys.current,
                self._policy,
                claims,
                request.identity,
                tenant=request.tenant,
                role=request.role,
                package_id=request.package_id,
                tls_key_sha256=hashlib.sha256(request.tls_key).hexdigest() if request.tls_key else "",
                nonce=request.nonce,
                gpus=gpus,
                now=now,
            )
            certificate = b""
            if request.certificate_request:
                # Its key is the TLS key, which is in the report data.
                name = ServiceName(request.role.value, request.tenant)
                certificate = self._certificates.attested(request.certificate_request, name, now, issued.expires_at)
                record.update(certificate_sha256=hashlib.sha256(certificate).hexdigest())
            chips = (*chips_of(claims), *(gpu.device_id for gpu in gpus))
            self._accept(record, request, claims, chips, issued, int(now))
        return Attested(issued.token, issued.expires_at, certificate)

    def _accept(
        self,
        record: Decision,
        request: AttestationRequest,
        claims: Claims,
        chips: tuple[str, ...],
        issued: IssuedToken,
        now: int,
    ) -> None:
        holder, measurements = request.identity.thumbprint, set(claims.measurements.values())
        record.update(holder=holder, jti=issued.token_id, **_collateral(claims))
        with record.accepting() as connection:
            check_workload_not_revoked(connection, holder, measurements, chips)
            if request.package_id:
                check_package_not_revoked(connection, request.tenant, request.package_id)
            keep_attestation(
                connection,
                issued.token_id,
                holder,
                request.tenant,
                measurements,
                chips,
                expires_at=issued.expires_at,
                now=now,
            )

    def _appraise(self, request: AttestationRequest) -> tuple[Claims, tuple[GpuClaims, ...], float]:
        """The claims, those of GPUs that the policy asks about, and the time at which they were found good."""
        _check_bounds(request)
        try:
            kind = EvidenceKind(request.evidence_kind)
        except ValueError:
            raise EvidenceRefusedError("this kind of evidence is not known", "evidence_kind_not_allowed") from None
        require_evidence_kind(self._policy, kind)
        require_hpke_suite(self._policy, request.identity.hpke_suite)
        now = self._clock()
        expected = binding(
            request.nonce,
            request.identity,
            attestor_thumbprint=self._bound_to(request),
            tenant=request.tenant,
            role=request.role,
            package_id=request.package_id,
            tls_key=request.tls_key,
        )
        checks = appraisal_of(self._policy, tenant=request.tenant, role=request.role, binding=expected, now=now)
        endorsements = (*self._endorsements.of(kind), *request.endorsements)
        claims = self._verifiers[kind].verify(request.evidence, endorsements, at=now)
        checks.verify(claims)
        gpus: tuple[GpuClaims, ...] = ()
        gpu_policy = self._policy.roles[request.role].gpu
        if gpu_policy is not None:
            nonce = gpu_nonce(expected.report_data)
            gpus = appraise_gpus(gpu_policy, request.gpu_evidence, nonce, self._gpu_verifier, at=now)
        return claims, gpus, now

    def _bound_to(self, request: AttestationRequest) -> str:
        """The key of this attestor that the evidence has to be bound to: while one is rotated, there are several."""
        current = self._keys.current.thumbprint
        named = request.attestor_thumbprint or current
        if named != current and self._keys.valid().get(named) is None:
            raise EvidenceRefusedError(
                "the evidence is bound to a key that is not this attestor's; ask for its keys again", "attestor_key"
            )
        return named


def _check_request(request: AttestationRequest) -> None:
    """Whoever wants a certificate has to ask for it with the TLS key that the evidence is bound to."""
    if request.certificate_request and public_key_info(read_request(request.certificate_request)) != request.tls_key:
        raise InvalidInputError("the certificate request is for another key than the TLS key of the evidence")


def _collateral(claims: Claims) -> dict[str, str | int]:
    """What the maker's collateral said, for the record."""
    found = {name: getattr(claims.details, name, None) for name in _COLLATERAL_FIELDS}
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in found.items()
        if isinstance(value, (str, int))
    }


def chips_of(claims: Claims) -> tuple[str, ...]:
    """Ids of the machine in the evidence, lower-case hex; none where a platform has no such id."""
    details = claims.details
    return tuple(value for name in CHIP_FIELDS if isinstance(value := getattr(details, name, None), str) and value)


def _check_bounds(request: AttestationRequest) -> None:
    if len(request.attestor_thumbprint) > MAX_THUMBPRINT:
        raise InvalidInputError("the attestor's thumbprint is malformed")
    if not 0 < len(request.evidence) <= MAX_EVIDENCE_BYTES:
        raise InvalidInputError(f"evidence must have 1 to {MAX_EVIDENCE_BYTES} bytes")
    if len(request.endorsements) > MAX_ENDORSEMENTS or sum(map(len, request.endorsements)) > MAX_ENDORSEMENTS_BYTES:
        raise InvalidInputError(f"at most {MAX_ENDORSEMENTS} endorsements with {MAX_ENDORSEMENTS_BYTES} bytes in all")
    if len(request.gpu_evidence) > MAX_GPU_EVIDENCE_BYTES:
        raise InvalidInputError(f"evidence of GPUs must have at most {MAX_GPU_EVIDENCE_BYTES} bytes")
    if len(request.tls_key) > MAX_TLS_KEY_BYTES:
        raise InvalidInputError(f"a TLS key must have at most {MAX_TLS_KEY_BYTES} bytes")
    _check_request(request)
    request.identity.validate()
    check_name(request.tenant, "tenant")
    if request.package_id:
        check_name(request.package_id, "package id")
