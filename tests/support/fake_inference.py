"""An inference service without a model, for tests of what talks to it. Model names script it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc

from tensorguard.errors import (
    AuthenticationError,
    BudgetExhaustedError,
    DeltaUnavailableError,
    LeaseExpiredError,
    UnavailableError,
)
from tensorguard.rpc.authorisation import PUBLIC, Rule
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2
from tensorguard.rpc.server import ServerOptions, Service, build_async_server

WORDS = ["Hello", " from", " the", " fake", "."]


def _head(status: int, content_type: str) -> inference_pb2.CompleteResponse:
    return inference_pb2.CompleteResponse(head=inference_pb2.ResponseHead(status=status, content_type=content_type))


def _body(data: bytes) -> inference_pb2.CompleteResponse:
    return inference_pb2.CompleteResponse(body=data)


class FakeInference:
    """Models: "base", "adapter", and one name per fault ("unavailable", "delta", "slow", ...)."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.CompleteRequest] = []
        self.called = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.evidence = "simulated"
        self.coprocessor_evidence = "simulated"

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:  # noqa: N802
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(name="org/base", created=1700000000, max_model_length=2048),
                inference_pb2.Model(name="adapter", parent="org/base", adapter_digest="ab" * 32, adapter_sequence=3),
            ]
        )

    async def GetStatus(self, request: Any, context: Any) -> inference_pb2.GetStatusResponse:  # noqa: N802
        adapter = inference_pb2.AdapterStatus(name="adapter", coprocessor_evidence_kind=self.coprocessor_evidence)
        return inference_pb2.GetStatusResponse(version="test", evidence_kind=self.evidence, adapters=[adapter])

    async def AttachAdapter(self, request: Any, context: Any) -> inference_pb2.AttachAdapterResponse:  # noqa: N802
        raise AssertionError("a gateway changes no adapters")

    async def DetachAdapter(self, request: Any, context: Any) -> inference_pb2.DetachAdapterResponse:  # noqa: N802
        raise AssertionError("a gateway changes no adapters")

    async def Complete(  # noqa: N802
        self, request: inference_pb2.CompleteRequest, context: Any
    ) -> AsyncIterator[inference_pb2.CompleteResponse]:
        self.requests.append(request)
        self.called.set()
        document = json.loads(request.body)
        model = document["model"]
        if model == "unavailable":
            raise UnavailableError("the engine is starting")
        if model == "delta":
            raise DeltaUnavailableError("the adapter cannot be computed now")
        if model == "lease":
            raise LeaseExpiredError("the lease is over")
        if model == "budget":
            raise BudgetExhaustedError("the budget is spent")
        if model == "defect":
            raise RuntimeError("a secret detail")
        if model == "refuses-gateway":
            raise AuthenticationError("wrong bearer secret")
        if model == "no-head":
            yield _body(b"{}")
            return
        if model == "slow":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if model == "bad-request":
            yield _head(400, "application/json")
            error = {
                "message": "max_tokens is too large",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            }
            yield _body(json.dumps({"error": error}).encode())
            return
        chat = request.endpoint == inference_pb2.ENDPOINT_CHAT_COMPLETIONS
        if not document.get("stream"):
            yield _head(200, "application/json")
            if model == "half":
                yield _body(b'{"id":')
                raise DeltaUnavailableError("the adapter cannot be computed now")
            whole = json.dumps(_document(chat, model)).encode()
            yield _body(whole[:20])
            yield _body(whole[20:])
            return
        yield _head(200, "text/event-stream; charset=utf-8")
        for word in WORDS:
            yield _body(b"data: " + json.dumps(_chunk(chat, model, word)).encode() + b"\n\n")
            if model == "half":
                raise DeltaUnavailableError("the adapter cannot be computed now")
            if model == "slow-stream":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        yield _body(b"data: [DONE]\n\n")


def _document(chat: bool, model: str) -> dict[str, Any]:
    text = "".join(WORDS)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "x",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def _chunk(chat: bool, model: str, word: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    choice |= {"delta": {"content": word}} if chat else {"text": word}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "x", "object": kind, "created": 1, "model": model, "choices": [choice]}


@contextlib.asynccontextmanager
async def running_fake(
    rule: Rule = PUBLIC, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[tuple[FakeInference, str]]:
    """A served fake and its address."""
    fake = FakeInference()
    descriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    service = Service(descriptor, fake, {method.name: rule for method in descriptor.methods})
    server = build_async_server([service], ServerOptions(address="127.0.0.1:0", credentials=credentials))
    await server.start()
    try:
        yield fake, server.address
    finally:
        await server.stop(0)
