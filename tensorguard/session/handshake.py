"""The host's half of opening a session: attest, exchange nonces and tokens, announce keys, attach adapters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import structlog

from tensorguard.ckks.host import HostSession
from tensorguard.ckks.packing import pack
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.errors import NotFoundError, TenSafeError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.result import AttestationResult
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.certificates import ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2, he_lora_pb2_grpc
from tensorguard.rpc.options import is_loopback
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls
from tensorguard.session.shared_memory import SharedRegion, offer_region
from tensorguard.session.transcript import NONCE_BYTES, SessionTranscript, split_basis

log = structlog.get_logger(__name__)

_Response = TypeVar("_Response")


@dataclass(slots=True)
class HostHandshake:
    """An authenticated connection to one coprocessor for one tenant, before and beside the evaluation stream."""

    endpoint: str
    workload: Workload
    parameters: ParameterSet
    channel: grpc.Channel
    transcript: SessionTranscript
    peer: AttestationResult
    timeout_seconds: float
    opened_at: float = field(default_factory=time.monotonic)
    _next_key: int = 0

    @classmethod
    def begin(
        cls,
        endpoint: str,
        workload: Workload,
        parameters: ParameterSet,
        connect_seconds: float,
        timeout_seconds: float,
        silence_seconds: float,
    ) -> HostHandshake:
        """Attest, exchange tokens and nonces, and check that the peer is an attested coprocessor of this tenant.

        Raises UnavailableError, EvidenceRefusedError, TokenError, PermissionDeniedError, AuthenticationError or
        ConfigurationError (plaintext to another machine).
        """
        token, verifier = workload.token(), workload.client.verifier()
        channel = open_channel(
            endpoint,
            tls=_tls_to_coprocessor(workload),
            wait_ready_seconds=connect_seconds,
            silence_seconds=silence_seconds,
            plaintext_network=workload.client.plaintext_network,
        )
        try:
            host_nonce = os.urandom(NONCE_BYTES)
            answer = _call(
                he_lora_pb2_grpc.HeLoraServiceStub(channel).BeginSession,
                he_lora_pb2.BeginSessionRequest(
                    host_token=token,
                    host_nonce=host_nonce,
                    parameter_set=parameters.name,
                    tenant=workload.tenant,
                ),
                endpoint,
                timeout_seconds,
            )
            peer = verifier.verify(answer.coprocessor_token, role=Role.COPROCESSOR, tenant=workload.tenant)
            transcript = SessionTranscript(
                tenant=workload.tenant,
                parameter_set=parameters.name,
                session_id=answer.session_id,
                host_nonce=host_nonce,
                coprocessor_nonce=answer.coprocessor_nonce,
                host_token=token,
                coprocessor_token=answer.coprocessor_token,
            )
            peer.identity.verify(answer.signature, transcript.coprocessor_statement())
        except BaseException:
            channel.close()
            raise
        return cls(endpoint, workload, parameters, channel, transcript, peer, timeout_seconds)

    def announce_key(self, pool_bytes: int = 0) -> tuple[int, HostSession]:
        """Make the session's next key pair, with a pool of this size, and send its public half, signed. The first
        call completes the session.
        """
        number = self._next_key
        key = HostSession.create(
            self.parameters, self.transcript.pk1_seed(number), self.transcript.session_id, pool_bytes=pool_bytes
        )
        try:
            self._send_key(number, key)
        except BaseException:
            key.close()
            raise
        self._next_key += 1
        return number, key

    def _send_key(self, number: int, key: HostSession) -> None:
        public_key = pack(key.public_key).tobytes()
        _call(
            self._stub.CompleteSession,
            he_lora_pb2.CompleteSessionRequest(
                session_id=self.transcript.session_id,
                key_number=number,
                public_key=public_key,
                signature=self.workload.identity.sign(self.transcript.host_key_statement(number, public_key)),
            ),
            self.endpoint,
            self.timeout_seconds,
        )

    def attach(self, adapter: str) -> tuple[int, bytes, bytes]:
        """(handle, manifest envelope, sealed basis) of an adapter. Raises NotFoundError when it is not
        served.
        """
        answer = _call(
            self._stub.AttachAdapter,
            he_lora_pb2.AttachAdapterRequest(session_id=self.transcript.session_id, adapter=adapter),
            self.endpoint,
            self.timeout_seconds,
        )
        return answer.adapter_handle, answer.manifest_envelope, answer.sealed_basis

    def share_memory(self, size: int) -> SharedRegion | None:
        """A region of `size` bytes that the coprocessor has open too, or None when frames are to go inline.

        None for size 0, for a coprocessor that is not on a loopback address, and when it does not prove that it reads
        the same memory; why is logged. This chooses a transport: either way the frames are the same.
        """
        host = self.endpoint.rpartition(":")[0]
        if not size or not is_loopback(host):
            return None
        try:
            offered = offer_region(size)
            try:
                offer = self.transcript.shared_memory_offer(offered.name, size)
                answer = _call(
                    self._stub.ShareMemory,
                    he_lora_pb2.ShareMemoryRequest(
                        session_id=self.transcript.session_id,
                        name=offered.name,
                        size=size,
                        signature=self.workload.identity.sign(offer),
                    ),
                    self.endpoint,
                    self.timeout_seconds,
                )
                proof = self.transcript.shared_memory_proof(offered.name, size, offered.challenge)
                self.peer.identity.verify(answer.signature, proof)
            finally:
                offered.withdraw()
        except TenSafeError as error:
            log.info("frames go inline: no shared memory", endpoint=self.endpoint, reason=error.reason)
            return None
        return offered.region

    def open_basis(self, sealed: bytes, adapter: str, manifest_digest: str) -> bytes:
        """The basis part in the clear, if it was sealed to us in this session by the attested coprocessor."""
        info = self.transcript.basis_info(adapter, manifest_digest)
        signature, basis = split_basis(self.workload.identity.open(sealed, info))
        self.peer.identity.verify(signature, self.transcript.basis_statement(adapter, manifest_digest, basis))
        return basis

    def end(self) -> None:
        """Tell the coprocessor, as far as it still listens, and close the channel."""
        try:
            self._stub.CloseSession(he_lora_pb2.CloseSessionRequest(session_id=self.transcript.session_id), timeout=1.0)
        except grpc.RpcError:
            pass  # it expires there
        finally:
            self.channel.close()

    @property
    def age_seconds(self) -> float:
        """Time since the tokens were exchanged."""
        return time.monotonic() - self.opened_at

    @property
    def _stub(self) -> he_lora_pb2_grpc.HeLoraServiceStub:
        return he_lora_pb2_grpc.HeLoraServiceStub(self.channel)


def packed_parameter_set(
    endpoint: str, workload: Workload, adapter: str, *, connect_seconds: float, timeout_seconds: float
) -> str:
    """Name of the parameter set that an adapter was packed for, which a session with it needs.

    Asked before there is a session, so nobody vouches for the answer; when the adapter is attached, its signed manifest
    has to say the same. Raises NotFoundError, UnavailableError and what attesting does.
    """
    workload.token()  # with TLS it brings the certificate that the coprocessor wants to see
    channel = open_channel(
        endpoint,
        tls=_tls_to_coprocessor(workload),
        wait_ready_seconds=connect_seconds,
        plaintext_network=workload.client.plaintext_network,
    )
    try:
        stub = he_lora_pb2_grpc.HeLoraServiceStub(channel)
        listed = _call(stub.ListAdapters, he_lora_pb2.ListAdaptersRequest(), endpoint, timeout_seconds)
    finally:
        channel.close()
    for known in listed.adapters:
        if known.name == adapter:
            return str(known.parameter_set)
    served = ", ".join(sorted(known.name for known in listed.adapters))
    raise NotFoundError(
        f"coprocessor {endpoint}: adapter {adapter!r} is not served here (served: {served or 'none'}): correct the name"
    )


def _tls_to_coprocessor(workload: Workload) -> ChannelTls | None:
    """As the attested host, to a coprocessor of its tenant; None where the attestor is reached without TLS, too."""
    tls = workload.client.tls
    if tls is None:
        return None
    return ChannelTls(tls.authority, ServiceName(Role.COPROCESSOR.value, workload.tenant), tls.identity())


def _call(method: Callable[..., _Response], request: object, endpoint: str, timeout_seconds: float) -> _Response:
    try:
        return method(request, timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise from_rpc_error(error, f"coprocessor {endpoint}") from None
