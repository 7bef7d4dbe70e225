"""An inference host by hand: every step of the session can be done wrongly."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from tensorguard.ckks.host import HostSession
from tensorguard.ckks.messages import EncryptedActivations
from tensorguard.ckks.packing import pack
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.ckks.plan import Plan
from tensorguard.evidence.claims import Role
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.session import frames
from tensorguard.session.shared_memory import OfferedRegion, SharedRegion, offer_region
from tensorguard.session.stream import EVALUATE, SESSION_KEY
from tensorguard.session.transcript import SessionTranscript
from tests.support.coprocessor import ADAPTER, TENANT, World

PARAMETERS = get_parameter_set(DEFAULT_PARAMETER_SET)


class RawHost:
    """Methods raise the TenSafeError that the coprocessor answered with."""

    def __init__(self, world: World, workload: Workload | None = None) -> None:
        self.world = world
        self.workload = workload or world.workload()
        self.channel = open_channel(world.endpoint)
        self.stub: Any = he_lora_pb2_grpc.HeLoraServiceStub(self.channel)
        self.transcript: SessionTranscript | None = None
        self.key: HostSession | None = None
        self.outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.answers: Any = None
        self.request_id = 0

    def close(self) -> None:
        self.outgoing.put(None)
        if self.answers is not None:
            self.answers.cancel()
        self.channel.close()

    def __enter__(self) -> RawHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.stub, method)(request, timeout=10)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def begin(self, **changes: Any) -> SessionTranscript:
        nonce = os.urandom(32)
        values = {
            "host_token": self.workload.token(),
            "host_nonce": nonce,
            "parameter_set": PARAMETERS.name,
            "tenant": TENANT,
        } | changes
        answer = self.call("BeginSession", pb.BeginSessionRequest(**values))
        self.transcript = SessionTranscript(
            tenant=values["tenant"],
            parameter_set=values["parameter_set"],
            session_id=answer.session_id,
            host_nonce=values["host_nonce"],
            coprocessor_nonce=answer.coprocessor_nonce,
            host_token=values["host_token"],
            coprocessor_token=answer.coprocessor_token,
        )
        return self.transcript

    def complete(
        self,
        number: int = 0,
        *,
        public_key: bytes | None = None,
        statement: bytes | None = None,
        signature: bytes | None = None,
    ) -> None:
        transcript = self.transcript
        assert transcript is not None
        key = HostSession.create(PARAMETERS, transcript.pk1_seed(number), transcript.session_id)
        sent = pack(key.public_key).tobytes() if public_key is None else public_key
        signed = transcript.host_key_statement(number, sent) if statement is None else statement
        self.call(
            "CompleteSession",
            pb.CompleteSessionRequest(
                session_id=transcript.session_id,
                key_number=number,
                public_key=sent,
                signature=self.workload.identity.sign(signed) if signature is None else signature,
            ),
        )
        self.key = key

    def attach(self, adapter: str = ADAPTER) -> pb.AttachAdapterResponse:
        assert self.transcript is not None
        request = pb.AttachAdapterRequest(session_id=self.transcript.session_id, adapter=adapter)
        answer: pb.AttachAdapterResponse = self.call("AttachAdapter", request)
        return answer

    def opened(self) -> RawHost:
        """Everything done right, with the stream open."""
        self.begin()
        self.complete()
        self.attach()
        self.stream()
        return self

    def stream(self, session_id: bytes | None = None, *, keep_previous: bool = False) -> None:
        assert self.transcript is not None
        name = self.transcript.session_id if session_id is None else session_id
        call = self.channel.stream_stream(
            EVALUATE, request_serializer=frames.identity, response_deserializer=frames.identity
        )
        if not keep_previous:
            self.outgoing.put(None)
        self.outgoing = queue.SimpleQueue()
        self.answers = call(_messages(self.outgoing), metadata=((SESSION_KEY, name),))

    def request(self, tokens: int = 1, **changes: Any) -> tuple[frames.EvaluationRequest, EncryptedActivations]:
        """A correct request of layer 0, qkv, changed as asked."""
        assert self.key is not None
        group = self.world.package.manifest.moai.groups[0]
        plan = Plan.parse(group.plans[0])
        x = np.random.default_rng(tokens).normal(size=(tokens, group.d_in))
        encrypted = self.key.encrypt(x, plan, group.norm_bound)
        self.request_id += 1
        values = {
            "request_id": self.request_id,
            "adapter_handle": 0,
            "layer": 0,
            "group": "qkv",
            "plan": plan,
            "tokens": tokens,
            "key_number": 0,
            "ids": encrypted.ids,
            "seeds": encrypted.seeds,
            "b": encrypted.b,
        } | changes
        return frames.EvaluationRequest(**values), encrypted

    def share(self, offered: OfferedRegion | None = None, **changes: Any) -> SharedRegion:
        """Offer memory, by default rightly, and check the proof."""
        transcript = self.transcript
        assert transcript is not None
        offered = offered or offer_region(1 << 20)
        values = {
            "session_id": transcript.session_id,
            "name": offered.name,
            "size": offered.region.size,
        } | changes
        statement = transcript.shared_memory_offer(values["name"], values["size"])
        request = pb.ShareMemoryRequest(**{"signature": self.workload.identity.sign(statement)} | values)
        try:
            answer = self.call("ShareMemory", request)
        finally:
            offered.withdraw()
        proof = transcript.shared_memory_proof(values["name"], values["size"], offered.challenge)
        peer = self.workload.client.verifier().verify(
            transcript.coprocessor_token, role=Role.COPROCESSOR, tenant=transcript.tenant
        )
        peer.identity.verify(answer.signature, proof)
        return offered.region

    def send(
        self, message: bytes, slot: frames.Slot | None = None
    ) -> frames.EvaluationResponse | frames.EvaluationFailure:
        """Send a message and read the answer to it."""
        self.outgoing.put(message)
        try:
            return frames.read_response(next(self.answers), PARAMETERS, slot)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def evaluate(self, tokens: int = 1, **changes: Any) -> frames.EvaluationResponse | frames.EvaluationFailure:
        return self.send(frames.write_request(self.request(tokens, **changes)[0]))


def _messages(outgoing: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
    while (message := outgoing.get()) is not None:
        yield message
