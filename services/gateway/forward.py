"""One OpenAI request: bounded body in, forwarded over gRPC, answer passed through as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from services.gateway.inference import Head, InferenceClient
from services.gateway.protocol import error_object
from tensorguard.errors import TenSafeError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2
from tensorguard.rpc.status import http_status, public_error

T = TypeVar("T")
EVENT_STREAM = "text/event-stream"
_log = structlog.get_logger(__name__)


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """Read the request's body; refuse one above `limit` bytes before keeping it, and a slow sender."""
    too_large = HTTPException(413, f"The request body is larger than {limit} bytes.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise too_large
            body.extend(chunk)

    try:
        await asyncio.wait_for(read(), timeout)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"The request body did not arrive within {timeout:g} seconds.") from error
    return bytes(body)


async def forward(
    request: Request, client: InferenceClient, message: inference_pb2.CompleteRequest, timeout: float
) -> Response:
    """Send `message` and answer with what comes back. A client that goes away cancels the gRPC call."""
    async with contextlib.AsyncExitStack() as stack:
        call = stack.enter_async_context(client.complete(message, timeout))
        head, chunks = await while_connected(request, call)
        if not head.content_type.startswith(EVENT_STREAM):
            # Kept whole, so that a failure half-way still becomes an error status.
            body = await while_connected(request, _join(chunks))
            return Response(body, head.status, media_type=head.content_type)
        return _stream(head, chunks, stack.pop_all())
    raise AssertionError("the exit stack swallows nothing")


def _stream(head: Head, chunks: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> Response:
    async def relay() -> AsyncIterator[bytes]:
        async with stack:
            try:
                async for chunk in chunks:
                    yield chunk
            except TenSafeError as error:
                # The status line is gone already: OpenAI's clients raise on an event that holds an error.
                shown = public_error(error)
                _log.warning("stream_failed", reason=error.reason)
                document = error_object(http_status(shown), shown.message, shown.reason)
                yield b"data: " + json.dumps(document).encode() + b"\n\n"

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(relay(), head.status, headers=headers, media_type=EVENT_STREAM)


async def _join(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it and raise ClientDisconnect as soon as the client is gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
