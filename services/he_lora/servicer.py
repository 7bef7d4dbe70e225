"""The gRPC face of the coprocessor. Authentication is by attested keys; see docs/protocol-session.md."""

# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import grpc
import structlog

from services.he_lora.adapters import AdapterStore
from services.he_lora.evaluation import Evaluation
from services.he_lora.sessions import Session, SessionRegistry
from tensorguard import __version__
from tensorguard.ckks.packing import packed_bytes, unpack_bytes
from tensorguard.ckks.parameters import get_parameter_set
from tensorguard.engines import Engine
from tensorguard.errors import (
    AuthenticationError,
    ConfigurationError,
    EvidenceRefusedError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.tls import check_channel
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.authorisation import ATTESTED, PUBLIC, SESSION, both, certified
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.server import Codec, Service
from tensorguard.rpc.tls import peer_of
from tensorguard.session import frames
from tensorguard.session.shared_memory import open_offered_region
from tensorguard.session.stream import SESSION_KEY
from tensorguard.session.transcript import NONCE_BYTES, SESSION_ID_BYTES, SessionTranscript, join_basis

log = structlog.get_logger(__name__)

RULES = {
    "ListAdapters": PUBLIC,
    "GetStatus": PUBLIC,
    "BeginSession": ATTESTED,
    "CompleteSession": SESSION,
    "ShareMemory": SESSION,
    "AttachAdapter": SESSION,
    "Evaluate": SESSION,
    "CloseSession": SESSION,
}
_HOST = certified(Role.INFERENCE.value)
RULES_WITH_TLS = {name: rule if rule is PUBLIC else both(_HOST, rule) for name, rule in RULES.items()}


class HeLoraServicer:
    """Implements HeLoraService for the adapters of one tenant."""

    def __init__(
        self,
        workload: Workload,
        store: AdapterStore,
        registry: SessionRegistry,
        evaluation: Evaluation,
        engine: Engine[Any],
        *,
        shared_memory_bytes: int = 0,
        tls: bool = False,
    ) -> None:
        """`shared_memory_bytes`: the most to share with one session; 0 refuses to. `tls`: callers have certificates."""
        self._rules = RULES_WITH_TLS if tls else RULES
        self._workload = workload
        self._store = store
        self._registry = registry
        self._evaluation = evaluation
        self._engine = engine
        self._shared_memory_bytes = shared_memory_bytes

    def service(self) -> Service:
        """Servicer, authorisation table and the hot path's raw codec, for the server factory."""
        codec = Codec(parse_request=frames.identity, serialise_response=frames.identity)
        return Service(pb.DESCRIPTOR.services_by_name["HeLoraService"], self, self._rules, codecs={"Evaluate": codec})

    def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        """Names, leases and budgets. No secrets."""
        return pb.ListAdaptersResponse(adapters=[adapter.summary() for adapter in self._store.all()])

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """Version, engine, evidence kind and operation counts."""
        return pb.GetStatusResponse(
            version=__version__,
            backend=self._engine.name,
            evidence_kind=self._workload.evidence_kind.value,
            sessions=len(self._registry),
            operations=self._evaluation.totals(),
        )

    def BeginSession(self, request: pb.BeginSessionRequest, context: Any) -> pb.BeginSessionResponse:
        """Checks the host's token; its possession of the attested key is proven by CompleteSession."""
        tenant = self._workload.tenant
        if request.tenant != tenant:
            raise PermissionDeniedError("this coprocessor serves another tenant; check the configured tenant")
        if len(request.host_nonce) != NONCE_BYTES:
            raise InvalidInputError(f"the nonce must have {NONCE_BYTES} bytes")
        try:
            parameters = get_parameter_set(request.parameter_set)
        except ConfigurationError as error:
            raise InvalidInputError(error.message) from None
        host = self._workload.client.verifier().verify(request.host_token, role=Role.INFERENCE, tenant=tenant)
        check_channel(peer_of(context.auth_context()), host)
        if host.simulated and self._workload.evidence_kind is not EvidenceKind.SIMULATED:
            raise EvidenceRefusedError(
                "this coprocessor has hardware evidence and opens nothing for a host that only simulates: "
                "run the host in a TEE",
                "simulated_evidence",
            )
        if host.identity == self._workload.identity.public:
            raise AuthenticationError("a workload cannot open a session with itself")
        transcript = SessionTranscript(
            tenant=tenant,
            parameter_set=parameters.name,
            session_id=os.urandom(SESSION_ID_BYTES),
            host_nonce=request.host_nonce,
            coprocessor_nonce=os.urandom(NONCE_BYTES),
            host_token=request.host_token,
            coprocessor_token=self._workload.token(),
        )
        now = self._registry.clock()
        self._registry.add(Session(transcript, parameters, host, opened_at=now, used_at=now))
        return pb.BeginSessionResponse(
            session_id=transcript.session_id,
            coprocessor_nonce=transcript.coprocessor_nonce,
            coprocessor_token=transcript.coprocessor_token,
            signature=self._workload.identity.sign(transcript.coprocessor_statement()),
        )

    def CompleteSession(self, request: pb.CompleteSessionRequest, context: Any) -> pb.CompleteSessionResponse:
        """Takes the host's next CKKS public key, signed under the key its token names."""
        session = self._registry.get(request.session_id, completed=False)
        parameters, transcript, number = session.parameters, session.transcript, request.key_number
        shape = (len(parameters.primes), parameters.degree)
        if len(request.public_key) != packed_bytes(*shape):
            raise InvalidInputError(f"the public key must have {packed_bytes(*shape)} bytes: packed residues")
        session.host.identity.verify(request.signature, transcript.host_key_statement(number, request.public_key))
        pk0 = unpack_bytes(request.public_key, shape)
        seed = transcript.pk1_seed(number)
        session.add_key(number, self._engine.evaluator(parameters, pk0, seed, transcript.session_id))
        if number == 0:
            log.info("session opened", evidence=session.host.kind.value, host=session.host.identity.thumbprint)
        return pb.CompleteSessionResponse()

    def ShareMemory(self, request: pb.ShareMemoryRequest, context: Any) -> pb.ShareMemoryResponse:
        """Opens the region that the host offers and proves, with the challenge in it, that this is one machine."""
        session = self._registry.get(request.session_id)
        name, size = request.name, request.size
        session.host.identity.verify(request.signature, session.transcript.shared_memory_offer(name, size))
        if not self._shared_memory_bytes:
            raise PermissionDeniedError("memory is not shared here (shared_memory_bytes is 0): send frames inline")
        region, challenge = open_offered_region(name, size, self._shared_memory_bytes)
        session.share(region)
        proof = session.transcript.shared_memory_proof(name, size, challenge)
        return pb.ShareMemoryResponse(signature=self._workload.identity.sign(proof))

    def AttachAdapter(self, request: pb.AttachAdapterRequest, context: Any) -> pb.AttachAdapterResponse:
        """The manifest in the clear and the basis sealed to the host's attested key."""
        session = self._registry.get(request.session_id)
        adapter = self._store.get(request.adapter)
        if adapter.parameters != session.parameters:
            raise InvalidInputError(
                f"adapter {adapter.name} needs parameter set {adapter.parameters.name}, not "
                f"{session.parameters.name}: open a session with that one"
            )
        transcript = session.transcript
        signature = self._workload.identity.sign(
            transcript.basis_statement(adapter.name, adapter.digest, adapter.basis)
        )
        sealed = session.host.identity.seal(
            join_basis(signature, adapter.basis), transcript.basis_info(adapter.name, adapter.digest)
        )
        return pb.AttachAdapterResponse(
            manifest_envelope=adapter.envelope,
            sealed_basis=sealed,
            adapter_handle=session.attach(adapter.name),
        )

    def Evaluate(self, request_iterator: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One frame in, one frame out, in order, in this stream's thread."""
        metadata: dict[str, Any] = dict(context.invocation_metadata())
        session_id = metadata.get(SESSION_KEY, b"")
        session = self._registry.get(session_id if isinstance(session_id, bytes) else b"")
        with session.lock:
            if session.streaming:
                raise PermissionDeniedError("this session has its stream already: open another session")
            session.streaming = True
        try:
            for message in request_iterator:
                if not self._registry.alive(session):
                    raise NotFoundError("the session has expired: begin a new one")
                yield self._evaluation.answer(session, message)
        except grpc.RpcError:
            return  # the host went away
        finally:
            # A session whose stream ended is over: its request and ciphertext counters must not be continued.
            self._registry.remove(session_id)
            session.memory = None  # closes it
            self._evaluation.ended(session)
            context.set_trailing_metadata(_operations(session))

    def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        """Forget the session and its keys."""
        self._registry.remove(request.session_id)
        return pb.CloseSessionResponse()


def _operations(session: Session) -> tuple[tuple[str, str], ...]:
    """What a session's stream did in all, as its trailing metadata: tensafe-ntt, tensafe-rotations, ..."""
    return tuple((f"tensafe-{name.replace('_', '-')}", str(session.operations[name])) for name in frames.OPERATIONS)
