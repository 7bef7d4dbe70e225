"""AttestorService on the wire: messages in, messages out. The rules are in the appraiser and the broker."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from services.attestor.appraiser import Appraiser, AttestationRequest
from services.attestor.broker import KeyBroker
from services.attestor.callers import Proof
from services.attestor.rate_limits import RateLimiter, peer_host
from services.attestor.watch import RevocationWatch
from tensorguard import __version__
from tensorguard.errors import RateLimitedError
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.roles import role_from_proto
from tensorguard.rpc.authorisation import ATTESTED, PUBLIC
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.store.audit import AuditLog
from tensorguard.store.nonces import NonceStore

RULES = {
    "GetKeys": PUBLIC,
    "CreateNonce": PUBLIC,
    "GetStatus": PUBLIC,
    "Attest": ATTESTED,
    "ReleaseKey": ATTESTED,
    "RenewLease": ATTESTED,
    "WatchRevocations": ATTESTED,
}


class AttestorServicer:
    """Implements tensafe.attestor.v1.AttestorService. Raises TenSafeError; the server maps it to a status."""

    def __init__(
        self,
        key: AttestorKey,
        policy: Policy,
        nonces: NonceStore,
        appraiser: Appraiser,
        broker: KeyBroker,
        watch: RevocationWatch,
        audit: AuditLog,
        limiter: RateLimiter,
    ) -> None:
        self._key = key
        self._policy = policy
        self._nonces = nonces
        self._appraiser = appraiser
        self._broker = broker
        self._watch = watch
        self._audit = audit
        self._limiter = limiter

    def GetKeys(self, request: pb.GetKeysRequest, context: grpc.ServicerContext) -> pb.GetKeysResponse:  # noqa: N802
        """The keys that verify this attestor's tokens."""
        self._admit(context)
        return pb.GetKeysResponse(jwks=self._key.key_set().to_jwks(), thumbprint=self._key.thumbprint)

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
            ),
            peer=peer,
        )
        return pb.AttestResponse(token=issued.token, expires_at=issued.expires_at)

    def ReleaseKey(  # noqa: N802
        self, request: pb.ReleaseKeyRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseKeyResponse:
        """Token in, sealed content key out."""
        peer = self._admit(context)
        released = self._broker.release(
            Proof(request.token, request.signature, request.request_nonce),
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
            Proof(request.token, request.signature, request.request_nonce),
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
        proof = Proof(request.token, request.signature, request.request_nonce)
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
