"""A workload's side of the attestor: prove what it is, get tokens, get and renew package keys."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from tensorguard.errors import EvidenceRefusedError, InvalidInputError, TokenError, UnavailableError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.ear import TokenVerifier, key_id_of
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import KeySet
from tensorguard.evidence.platform import GpuPlatform, Platform
from tensorguard.evidence.release import (
    REQUEST_NONCE_BYTES,
    LeaseTerms,
    Release,
    RevocationNotice,
    release_transcript,
    renew_transcript,
    sealed_key_info,
    watch_transcript,
)
from tensorguard.evidence.report_data import binding, gpu_nonce
from tensorguard.evidence.roles import role_to_proto
from tensorguard.evidence.tls import ATTESTOR, CertifiedKey, MutualChannel
from tensorguard.rpc.certificates import ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2, attestor_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls

CONTENT_KEY_BYTES = 32
KEYS_SECONDS = 60.0
"""How long an answer to GetKeys is believed: a rotated key is announced for longer."""
_WATCH_SECONDS = 360.0
"""Longer than any token lives: a stream that has not ended by then is dead."""
_Response = TypeVar("_Response")


@dataclass(frozen=True, slots=True)
class ReleasedKey:
    """A package's content key and the lease it comes with."""

    terms: LeaseTerms
    content_key: bytes = field(repr=False)


class AttestorClient:
    """Talks to one attestor. Safe for several threads.

    Errors are those of `tensorguard.errors`; an attestor that cannot be reached is an UnavailableError that
    names its endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        thumbprint: str | None = None,
        tls: CertifiedKey | None = None,
        plaintext_network: bool = False,
        channel: grpc.Channel | None = None,
        timeout_seconds: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`thumbprint`: RFC 7638 thumbprint the attestor's key must have, or several with commas between them, one of
        which it must have; without it the first answer is believed, which is for one machine only. `tls`: the key that
        the attestor certifies, and the authority it is known by; plaintext without, beyond loopback only with
        `plaintext_network` (ConfigurationError). `channel`: used instead of opening one to `endpoint`.
        """
        self.endpoint = endpoint
        self.tls = tls
        self.plaintext_network = plaintext_network
        self._pins = [name.strip() for name in thumbprint.split(",")] if thumbprint else []
        self._channels = [channel if channel is not None else self._open()]
        self._stub = attestor_pb2_grpc.AttestorServiceStub(self._channels[-1])
        self._mutual = MutualChannel(endpoint, tls, clock) if tls is not None else None
        self._timeout = timeout_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: tuple[KeySet, str] | None = None
        self._keys_from = 0.0

    def jwks(self) -> KeySet:
        """The keys that verify this attestor's tokens: only pinned ones where there is a pin."""
        return self._attestor_keys()[0]

    @property
    def attestor_thumbprint(self) -> str:
        """Thumbprint of the key that signs new tokens."""
        return self._attestor_keys()[1]

    def verifier(self) -> TokenVerifier:
        """Verifies tokens of this attestor, such as a peer presents."""
        return TokenVerifier(self.jwks(), clock=self._clock)

    def attest(
        self,
        identity: WorkloadIdentity,
        platform: Platform,
        *,
        role: Role,
        tenant: str,
        package_id: str = "",
        tls_key: bytes = b"",
        gpus: GpuPlatform | None = None,
    ) -> str:
        """A fresh token for this identity: challenge, evidence, appraisal. With `tls`, a certificate comes with it.

        `tls_key`: SubjectPublicKeyInfo of a TLS key to name in the token, where the client has no `tls`.
        `gpus`: of a host whose policy asks about them.
        Raises EvidenceRefusedError when the policy does not accept this workload.
        """
        tls = self.tls
        if tls is not None:
            tls_key = tls.public_key
            if tls.reload():
                self._reconnect()
        thumbprint = self.attestor_thumbprint
        nonce = self._call(self._stub.CreateNonce, attestor_pb2.CreateNonceRequest()).nonce
        bound = binding(
            nonce,
            identity.public,
            attestor_thumbprint=thumbprint,
            tenant=tenant,
            role=role,
            package_id=package_id,
            tls_key=tls_key,
        )
        collected = platform.collect(bound, role)
        answer = self._call(
            self._stub.Attest,
            attestor_pb2.AttestRequest(
                nonce=nonce,
                evidence_kind=platform.kind.value,
                evidence=collected.evidence,
                endorsements=collected.endorsements,
                signing_key=identity.public.signing_key,
                hpke_key=identity.public.hpke_key,
                tls_key=tls_key,
                tenant=tenant,
                role=role_to_proto(role),
                package_id=package_id,
                gpu_evidence=gpus.collect(gpu_nonce(bound.report_data)) if gpus is not None else b"",
                attestor_thumbprint=thumbprint,
                certificate_request=tls.request() if tls is not None else b"",
            ),
        )
        token = answer.token
        result = self.verifier().verify(token, role=role, tenant=tenant, package_id=package_id)
        expected_tls = hashlib.sha256(tls_key).hexdigest() if tls_key else ""
        if result.identity != identity.public or result.tls_key_sha256 != expected_tls:
            raise TokenError("the attestor answered with a token for other keys")
        if tls is not None:
            tls.accept(answer.certificate, ServiceName(role.value, tenant), answer.mutual_port)
        return token

    def release_key(
        self, identity: WorkloadIdentity, token: str, release: Release, *, tokens_wanted: int
    ) -> ReleasedKey:
        """The content key of `release`, under a lease that grants up to `tokens_wanted` tokens.

        Asking again with the same token gives the same lease. Raises PermissionDeniedError, NotFoundError or
        BudgetExhaustedError as the attestor decides, AuthenticationError when the answer does not open.
        """
        if len(release.manifest_digest) != 32:
            raise InvalidInputError("a manifest digest has 32 bytes")
        thumbprint = key_id_of(token)
        nonce = secrets.token_bytes(REQUEST_NONCE_BYTES)
        signed = release_transcript(thumbprint, token, release, tokens_wanted, nonce)
        answer = self._call(
            self._caller().ReleaseKey,
            attestor_pb2.ReleaseKeyRequest(
                token=token,
                manifest_digest=release.manifest_digest,
                package_id=release.package_id,
                sequence=release.sequence,
                tokens_wanted=tokens_wanted,
                signature=identity.sign(signed),
                request_nonce=nonce,
            ),
        )
        terms = LeaseTerms(answer.lease_id, answer.lease_expires_at, answer.tokens_granted)
        info = sealed_key_info(thumbprint, identity.public.hpke_suite, release, nonce, terms)
        content_key = identity.open(answer.sealed_key, info)
        if len(content_key) != CONTENT_KEY_BYTES:
            raise EvidenceRefusedError("the attestor sealed something that is not a content key")
        return ReleasedKey(terms, content_key)

    def renew(
        self,
        identity: WorkloadIdentity,
        token: str,
        lease_id: str,
        *,
        tokens_used: int,
        tokens_wanted: int,
    ) -> LeaseTerms:
        """Extend a lease that has not expired: `tokens_used` in total so far, `tokens_wanted` more.

        Raises LeaseExpiredError (attest and release again) or BudgetExhaustedError (nothing is left).
        """
        nonce = secrets.token_bytes(REQUEST_NONCE_BYTES)
        signed = renew_transcript(key_id_of(token), token, lease_id, tokens_used, tokens_wanted, nonce)
        answer = self._call(
            self._caller().RenewLease,
            attestor_pb2.RenewLeaseRequest(
                token=token,
                lease_id=lease_id,
                tokens_used=tokens_used,
                tokens_wanted=tokens_wanted,
                signature=identity.sign(signed),
                request_nonce=nonce,
            ),
        )
        return LeaseTerms(lease_id, answer.lease_expires_at, answer.tokens_granted)

    def watch_revocations(self, identity: WorkloadIdentity, token: str, after: int) -> Iterator[RevocationNotice]:
        """Revocations behind number `after` that concern the token's tenant, as they come, until the token expires.

        Raises what the attestor refuses the token with, UnavailableError when the stream breaks.
        """
        nonce = secrets.token_bytes(REQUEST_NONCE_BYTES)
        request = attestor_pb2.WatchRevocationsRequest(
            token=token,
            signature=identity.sign(watch_transcript(key_id_of(token), token, after, nonce)),
            request_nonce=nonce,
            after=after,
        )
        try:
            for answer in self._caller().WatchRevocations(request, timeout=_WATCH_SECONDS):
                yield RevocationNotice(answer.number, answer.package_id, answer.sequence, tuple(answer.workloads))
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"attestor {self.endpoint}") from None

    def status(self) -> attestor_pb2.GetStatusResponse:
        """What the attestor says it is."""
        return self._call(self._stub.GetStatus, attestor_pb2.GetStatusRequest())

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            channel.close()
        if self._mutual is not None:
            self._mutual.close()

    def _open(self) -> grpc.Channel:
        tls = None if self.tls is None else ChannelTls(self.tls.authority, ATTESTOR)
        return open_channel(self.endpoint, tls=tls, plaintext_network=self.plaintext_network)

    def _reconnect(self) -> None:
        """Know the attestor by another authority. Calls of other threads end on the channel of before."""
        self._channels.append(self._open())
        self._stub = attestor_pb2_grpc.AttestorServiceStub(self._channels[-1])

    def _caller(self) -> attestor_pb2_grpc.AttestorServiceStub:
        """For methods that want a certificate, where there are certificates."""
        if self._mutual is None:
            return self._stub
        return attestor_pb2_grpc.AttestorServiceStub(self._mutual.channel())

    def _attestor_keys(self) -> tuple[KeySet, str]:
        """The attestor's keys, asked for again once a minute: it may announce one and later sign with it."""
        with self._lock:
            if self._keys is None or not 0 <= self._clock() - self._keys_from < KEYS_SECONDS:
                try:
                    self._keys = self._ask_for_keys()
                except UnavailableError:
                    # Those of before verify what it signed before. It signs nothing while it is away.
                    if self._keys is None:
                        raise
                self._keys_from = self._clock()
            return self._keys

    def _ask_for_keys(self) -> tuple[KeySet, str]:
        answer = self._call(self._stub.GetKeys, attestor_pb2.GetKeysRequest())
        keys = KeySet.from_jwks(answer.jwks)
        if self._pins:
            # Other keys beside the pinned ones could be anybody's.
            keys = keys.only(self._pins)
        if keys.get(answer.thumbprint) is None:
            raise TokenError(
                f"the attestor signs with the key {answer.thumbprint:.43}, which is "
                + ("not pinned: if it was rotated, add its thumbprint" if self._pins else "not in its key set")
            )
        return keys, answer.thumbprint

    def _call(self, method: Callable[..., _Response], request: Any) -> _Response:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"attestor {self.endpoint}") from None
