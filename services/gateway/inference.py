"""The gateway's view of the inference service: models, state, and one call per OpenAI request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from tensorguard.errors import AuthenticationError, InternalError, TenSafeError, TokenError, UnavailableError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2, inference_pb2_grpc
from tensorguard.rpc.status import from_rpc_error

_QUICK_SECONDS = 5.0
UNKNOWN_EVIDENCE = "unknown"


@dataclass(frozen=True, slots=True)
class Head:
    """How the inference service answers: HTTP status and content type for the user."""

    status: int
    content_type: str


class InferenceClient:
    """Thin asynchronous client. Raises TenSafeError for every failure."""

    def __init__(self, channel: grpc.aio.Channel, endpoint: str, secret: str = "") -> None:
        """`secret` is what the inference service wants from internal callers, if anything."""
        self._channel = channel
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._endpoint = endpoint
        self._metadata = (("authorization", f"Bearer {secret}"),) if secret else ()

    def use(self, channel: grpc.aio.Channel) -> grpc.aio.Channel:
        """Make new calls on another channel; the one before, for who closes it."""
        old, self._channel = self._channel, channel
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return old

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def models(self) -> list[inference_pb2.Model]:
        try:
            answer = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=_QUICK_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._error(error) from error
        return list(answer.models)

    async def status(self) -> inference_pb2.GetStatusResponse:
        try:
            return await self._stub.GetStatus(
                inference_pb2.GetStatusRequest(), timeout=_QUICK_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._error(error) from error

    @contextlib.asynccontextmanager
    async def complete(
        self, request: inference_pb2.CompleteRequest, timeout: float
    ) -> AsyncIterator[tuple[Head, AsyncIterator[bytes]]]:
        """Run one request: yields the head and the body's chunks. Leaving the block cancels the call."""
        call = self._stub.Complete(request, timeout=timeout, metadata=self._metadata)
        try:
            yield await self._head(call), self._chunks(call)
        finally:
            call.cancel()

    async def _head(self, call: grpc.aio.UnaryStreamCall) -> Head:  # type: ignore[type-arg]
        try:
            first = await call.read()
        except grpc.RpcError as error:
            raise self._error(error) from error
        if not isinstance(first, inference_pb2.CompleteResponse) or first.WhichOneof("part") != "head":
            raise InternalError("the inference service did not begin its answer with a head")
        if not 200 <= first.head.status <= 599:
            raise InternalError(f"the inference service answered with HTTP status {first.head.status}")
        return Head(first.head.status, first.head.content_type or "application/json")

    async def _chunks(self, call: grpc.aio.UnaryStreamCall) -> AsyncIterator[bytes]:  # type: ignore[type-arg]
        try:
            async for part in call:
                if part.WhichOneof("part") != "body":
                    raise InternalError("the inference service sent a second head")
                yield part.body
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> TenSafeError:
        """What went wrong behind the gateway. The user's own key was accepted, so it is never a 401."""
        restored = from_rpc_error(error, self._endpoint)
        if isinstance(restored, AuthenticationError | TokenError):
            return UnavailableError(f"the inference service refused the gateway: {restored.message}")
        return restored


class EvidenceWatch:
    """Remembers for a few seconds which evidence kind stands behind the answers, for the response header."""

    def __init__(self, client: InferenceClient, seconds: float) -> None:
        self._client = client
        self._seconds = seconds
        self._kind = UNKNOWN_EVIDENCE
        self._fresh_until = 0.0
        self._lock = asyncio.Lock()

    async def kind(self) -> str:
        """The evidence kind, several joined by "+", or "unknown" while the inference service is away."""
        if time.monotonic() >= self._fresh_until:
            async with self._lock:
                if time.monotonic() >= self._fresh_until:
                    self._kind = await self._ask()
                    self._fresh_until = time.monotonic() + self._seconds
        return self._kind

    async def _ask(self) -> str:
        try:
            status = await self._client.status()
        except TenSafeError:
            return UNKNOWN_EVIDENCE
        kinds = {status.evidence_kind, *(adapter.coprocessor_evidence_kind for adapter in status.adapters)}
        return "+".join(sorted(kinds - {""})) or UNKNOWN_EVIDENCE
