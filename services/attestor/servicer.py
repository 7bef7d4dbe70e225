"""AttestorService on the wire: messages in, messages out. The rules are in the appraiser and the broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from services.attestor.appraiser import Appraiser, AttestationRequest
from services.attestor.broker import KeyBroker
from services.attestor.callers import Proof
from services.attestor.certificates import CertificateIssuer
from services.attestor.rate_limits import RateLimiter, peer_host
from services.attestor.watch import RevocationWatch
from tensorguard import __version__
from tensorguard.errors import RateLimitedError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.roles import role_from_proto
from tensorguard.rpc.authorisation import ATTESTED, ENROLLED, PUBLIC, both, certified
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.tls import peer_of
from tensorguard.store.audit import AuditLog
from tensorguard.store.enrolments import ENROLLED_ROLES
from tensorguard.store.nonces import NonceStore
from tensorguard.store.signing_keys import SigningKeys

RULES = {
    "GetKeys": PUBLIC,
    "CreateNonce": PUBLIC,
    "GetStatus": PUBLIC,
    "Attest": ATTESTED,
    "Enrol": ENROLLED,
    "RenewCertificate": ENROLLED,
    "ReleaseKey": ATTESTED,
    "RenewLease": ATTESTED,
    "WatchRevocations": ATTESTED,
}
_COPROCESSOR, _INFERENCE = Role.COPROCESSOR.value, Role.INFERENCE.value
RULES_WITH_TLS = RULES | {
    "RenewCertificate": both(certified(*ENROLLED_ROLES), ENROLLED),
    "ReleaseKey": both(certified(_COPROCESSOR), ATTESTED),
    "RenewLease": both(certified(_COPROCESSOR), ATTESTED),
    "WatchRevocations": both(certified(_COPROCESSOR, _INFERENCE), ATTESTED),
}
"""Whoever has a certificate has to show it; the other methods are how one is got."""


class AttestorServicer:
    """Implements tensafe.attestor.v1.AttestorService. Raises TenSafeError; the server maps it to a status."""

    def __init__(
        self,
        keys: SigningKeys,
        policy: Policy,
        nonces: NonceStore,
        appraiser: Appraiser,
        broker: KeyBroker,
        watch: RevocationWatch,
        audit: AuditLog,
        limiter: RateLimiter,
        certificates: CertificateIssuer,
    ) -> None:
        self._keys = keys
        self._policy = policy
        self._nonces = nonces
        self._appraiser = appraiser
        self._broker = broker
        self._watch = watch
        self._audit = audit
        self._limiter = limiter
        self._certificates = certificates
        self.mutual_port = 0
        """Of the address that asks for certificates; 0 without TLS."""

    def GetKeys(self, request: pb.GetKeysRequest, context: grpc.ServicerContext) -> pb.GetKeysResponse:  # noqa: N802
        """The keys that verify this attestor's tokens."""
        self._admit(context)
        return pb.GetKeysResponse(jwks=self._keys.valid().to_jwks(), thumbprint=self._keys.current.thumbprint)

    def CreateNonce(  # noqa: N802
        self, request: pb.CreateNonceRequest, context: grpc.ServicerContext
    ) -> pb.CreateNonceResponse:
        """A challenge."""
        self._admit(context)
        nonce = self._nonces.create()
        return pb.CreateNonceResponse(nonce=nonce.value, expires_at=nonce.expires_at)

    def Attest(self, request: pb.AttestRequest, context: grpc.ServicerContext) -> pb.AttestResponse:  # noqa: N802
        """Evidence in, token out."""
        peer = self._admit(context)
        issued = self._appraiser.attest(
            AttestationRequest(
                nonce=request.nonce,
                evidence_kind=request.evidence_kind,
                evidence=request.evidence,
                endorsements=tuple(request.endorsements),
                identity=PublicIdentity(request.signing_key, request.hpke_key),
                tls_key=request.tls_key,
                tenant=request.tenant,
                role=role_from_proto(request.role),
                package_id=request.package_id,
                gpu_evidence=request.gpu_evidence,
                attestor_thumbprint=request.attestor_thumbprint,
                certificate_request=request.certificate_request,
            ),
            peer=peer,
        )
        return pb.AttestResponse(
            token=issued.token,
            expires_at=issued.expires_at,
            certificate=issued.certificate,
            mutual_port=self.mutual_port,
        )

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolResponse:  # noqa: N802
        """Enrolment secret in, certificate out."""
        peer = self._admit(context)
        certificate = self._certificates.enrol(request.secret, request.certificate_request, peer=peer)
        return pb.EnrolResponse(certificate=certificate, mutual_port=self.mutual_port)

    def RenewCertificate(  # noqa: N802
        self, request: pb.RenewCertificateRequest, context: grpc.ServicerContext
    ) -> pb.RenewCertificateResponse:
        """Another certificate for the caller."""
        peer = self._admit(context)
        caller = peer_of(context.auth_context())
        return pb.RenewCertificateResponse(
            certificate=self._certificates.renew(caller, request.certificate_request, peer=peer)
        )

    def ReleaseKey(  # noqa: N802
        self, request: pb.ReleaseKeyRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseKeyResponse:
        """Token in, sealed content key out."""
        peer = self._admit(context)
        released = self._broker.release(
            _proof(request, context),
            package_id=request.package_id,
            sequence=request.sequence,
            manifest_digest=request.manifest_digest,
            tokens_wanted=request.tokens_wanted,
            peer=peer,
        )
        return pb.ReleaseKeyResponse(
            sealed_key=released.sealed,
            lease_id=released.terms.lease_id,
            lease_expires_at=released.terms.expires_at,
            tokens_granted=released.terms.tokens_granted,
        )

    def RenewLease(  # noqa: N802
        self, request: pb.RenewLeaseRequest, context: grpc.ServicerContext
    ) -> pb.RenewLeaseResponse:
        """A longer lease and more tokens."""
        peer = self._admit(context)
        terms = self._broker.renew(
            _proof(request, context),
            lease_id=request.lease_id,
            tokens_used=request.tokens_used,
            tokens_wanted=request.tokens_wanted,
            peer=peer,
        )
        return pb.RenewLeaseResponse(lease_expires_at=terms.expires_at, tokens_granted=terms.tokens_granted)

    def WatchRevocations(  # noqa: N802
        self, request: pb.WatchRevocationsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchRevocationsResponse]:
        """Revocations that concern the caller's tenant, as they come."""
        self._admit(context)
        proof = _proof(request, context)
        for notice in self._watch.follow(proof, request.after, context.is_active):
            yield pb.WatchRevocationsResponse(
                number=notice.number,
                package_id=notice.package_id,
                sequence=notice.sequence,
                workloads=notice.workloads,
            )

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: N802
        """What this attestor is. No secrets."""
        self._admit(context)
        head = self._audit.head
        return pb.GetStatusResponse(
            version=__version__,
            policy_id=self._policy.id,
            policy_hash=self._policy.sha256,
            evidence_kinds=[kind.value for kind in self._policy.evidence_kinds],
            audit_records=head.records,
            audit_head=head.hash,
        )

    def _admit(self, context: grpc.ServicerContext) -> str:
        """The caller's host. Raises RateLimitedError before anything of the request is looked at."""
        peer = peer_host(context.peer())
        if not self._limiter.admit(peer):
            raise RateLimitedError("too many requests; ask less often")
        return peer


def _proof(request: Any, context: grpc.ServicerContext) -> Proof:
    return Proof(request.token, request.signature, request.request_nonce, peer_of(context.auth_context()))
