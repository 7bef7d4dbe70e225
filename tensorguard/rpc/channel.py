"""The one place that builds gRPC channels: `open_channel` (synchronous) and `open_async_channel`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.rpc.options import DEFAULT_MESSAGE_BYTES, SILENCE_SECONDS, channel_options, is_loopback
from tensorguard.rpc.request_id import REQUEST_ID_KEY, current_request_id
from tensorguard.rpc.tls import ChannelTls


def open_channel(
    endpoint: str,
    *,
    tls: ChannelTls | None = None,
    message_bytes: int = DEFAULT_MESSAGE_BYTES,
    wait_ready_seconds: float | None = None,
    silence_seconds: float = SILENCE_SECONDS,
    plaintext_network: bool = False,
) -> grpc.Channel:
    """A channel whose calls carry the running request's id, and fail when the peer is silent for too long.

    With `wait_ready_seconds` the connection is made now, and UnavailableError names the endpoint when it is
    not there in time; without, the first call connects. `silence_seconds`: see `tensorguard.rpc.options`; at least 1.
    `tls`: whom the channel may reach, and as whom; without, it is plaintext, and ConfigurationError refuses another
    endpoint than on loopback unless `plaintext_network` permits it, for private container networks.
    """
    options = channel_options(message_bytes, silence_seconds)
    if tls is None:
        _check_plaintext(endpoint, plaintext_network)
        channel = grpc.insecure_channel(endpoint, options)
    else:
        channel = grpc.secure_channel(endpoint, tls.credentials(), [*options, *tls.options()])
    if wait_ready_seconds is not None:
        try:
            grpc.channel_ready_future(channel).result(timeout=wait_ready_seconds)
        except grpc.FutureTimeoutError:
            channel.close()
            raise _not_ready(endpoint, wait_ready_seconds) from None
    return grpc.intercept_channel(channel, _SyncRequestId())


async def open_async_channel(
    endpoint: str,
    *,
    tls: ChannelTls | None = None,
    message_bytes: int = DEFAULT_MESSAGE_BYTES,
    wait_ready_seconds: float | None = None,
    plaintext_network: bool = False,
) -> grpc.aio.Channel:
    """The same for asyncio."""
    options = channel_options(message_bytes, SILENCE_SECONDS)
    interceptors = [_AsyncUnaryUnary(), _AsyncUnaryStream(), _AsyncStreamUnary(), _AsyncStreamStream()]
    if tls is None:
        _check_plaintext(endpoint, plaintext_network)
        channel = grpc.aio.insecure_channel(endpoint, options, interceptors=interceptors)
    else:
        channel = grpc.aio.secure_channel(
            endpoint, tls.credentials(), [*options, *tls.options()], interceptors=interceptors
        )
    if wait_ready_seconds is not None:
        try:
            await asyncio.wait_for(channel.channel_ready(), wait_ready_seconds)
        except asyncio.TimeoutError:
            await channel.close()
            raise _not_ready(endpoint, wait_ready_seconds) from None
    return channel


def _check_plaintext(endpoint: str, permitted: bool) -> None:
    host = endpoint.rpartition(":")[0]
    if not permitted and not endpoint.startswith("unix:") and not is_loopback(host):
        raise ConfigurationError(
            f"{endpoint} is not a loopback address and TLS is not configured: give the attestor's authority "
            "(attestor_authority), or permit plaintext on a private network explicitly (plaintext_network)"
        )


def _not_ready(endpoint: str, seconds: float) -> UnavailableError:
    return UnavailableError(
        f"no service answers at {endpoint} (waited {seconds:g} s): is it running, is the address right? Where TLS "
        "is used, both ends need certificates of one authority that have not ended."
    )


class _Details(NamedTuple):
    """Call details with one more metadata entry (gRPC's own are immutable)."""

    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any = None


def _with_request_id(details: Any, metadata_type: Callable[[Any], Any]) -> Any:
    present = list(details.metadata or ())
    if not any(key == REQUEST_ID_KEY for key, _ in present):
        present.append((REQUEST_ID_KEY, current_request_id()))
    return _Details(
        details.method,
        details.timeout,
        metadata_type(present),
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )


def _sync(self: Any, continuation: Any, details: Any, request: Any) -> Any:
    return continuation(_with_request_id(details, tuple), request)


async def _async(self: Any, continuation: Any, details: Any, request: Any) -> Any:
    return await continuation(_with_request_id(details, lambda pairs: grpc.aio.Metadata(*pairs)), request)


# The stubs give each kind of call a type of its own; all four only gain one metadata entry.
_sync_with_id: Any = _sync
_async_with_id: Any = _async


class _SyncRequestId(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    intercept_unary_unary = _sync_with_id
    intercept_unary_stream = _sync_with_id
    intercept_stream_unary = _sync_with_id
    intercept_stream_stream = _sync_with_id


# One class each: asyncio channels register an interceptor for the first kind it is an instance of.
class _AsyncUnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = _async_with_id


class _AsyncUnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = _async_with_id


class _AsyncStreamUnary(grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary = _async_with_id


class _AsyncStreamStream(grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream = _async_with_id
