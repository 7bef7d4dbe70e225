"""A servicer of the coprocessor's contract that echoes or fails as asked, for both kinds of server."""

# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import structlog

from tensorguard.errors import BudgetExhaustedError
from tensorguard.rpc.authorisation import PUBLIC, Rule
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["HeLoraService"]
SECRET = "do-not-tell-anyone"


def rules(**changes: Rule) -> dict[str, Rule]:
    return {method.name: PUBLIC for method in DESCRIPTOR.methods} | changes


def bound_request_id() -> str:
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


class Echo:
    def GetStatus(self, request: Any, context: Any) -> Any:
        return pb.GetStatusResponse(version=bound_request_id())

    def ListAdapters(self, request: Any, context: Any) -> Any:
        raise BudgetExhaustedError("the budget is spent: pack a new sequence")

    def CloseSession(self, request: Any, context: Any) -> Any:
        raise ValueError(SECRET)

    def BeginSession(self, request: Any, context: Any) -> Any:
        return pb.BeginSessionResponse()

    CompleteSession = ShareMemory = AttachAdapter = BeginSession

    def Evaluate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            if request.frame == b"fail":
                raise BudgetExhaustedError("spent")
            yield pb.EvaluateResponse(frame=request.frame)


class AsyncEcho:
    async def GetStatus(self, request: Any, context: Any) -> Any:
        return pb.GetStatusResponse(version=bound_request_id())

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        raise BudgetExhaustedError("the budget is spent: pack a new sequence")

    async def CloseSession(self, request: Any, context: Any) -> Any:
        raise ValueError(SECRET)

    async def BeginSession(self, request: Any, context: Any) -> Any:
        return pb.BeginSessionResponse()

    CompleteSession = ShareMemory = AttachAdapter = BeginSession

    async def Evaluate(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if request.frame == b"fail":
                raise BudgetExhaustedError("spent")
            yield pb.EvaluateResponse(frame=request.frame)
