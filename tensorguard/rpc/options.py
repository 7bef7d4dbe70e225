"""gRPC channel arguments that both ends share. Each is here for a reason that is written beside it."""

from __future__ import annotations

import ipaddress

from tensorguard.errors import ConfigurationError

DEFAULT_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message either way. Evaluation frames are kept near 1 MiB; manifests and bases are a few MiB."""

SILENCE_SECONDS = 60.0
LEAST_SILENCE_SECONDS = 1.0


def _common_options(message_bytes: int, silence_seconds: float) -> list[tuple[str, int]]:
    """Arguments of servers and channels alike.

    silence_seconds: a peer that answers no HTTP/2 ping for so long is given up, and its calls fail. Pings are answered
    by gRPC's own threads, so a process that computes for minutes, or holds Python's lock, is alive; one that was
    stopped, or whose machine is gone, is not. They go on while no call is open.
    """
    interval_ms, timeout_ms = int(silence_seconds * 125), int(silence_seconds * 750)
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # The last ping before the silence may go out two intervals after the last sign of life: 2/8 + 6/8.
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # gRPC's default of a minute would be waited for in any case.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(message_bytes: int) -> list[tuple[str, int]]:
    """Arguments of a server."""
    return [
        *_common_options(message_bytes, SILENCE_SECONDS),
        # A port in use must be an error, not a silent share of another process's traffic.
        ("grpc.so_reuseport", 0),
        # Accept our own channels' pings, refuse floods of them.
        ("grpc.http2.min_ping_interval_without_data_ms", int(LEAST_SILENCE_SECONDS * 100)),
        ("grpc.max_metadata_size", 16 * 1024),
    ]


def channel_options(message_bytes: int, silence_seconds: float) -> list[tuple[str, int]]:
    """Arguments of a channel. Raises ConfigurationError for a silence that servers would take for a flood of pings."""
    if silence_seconds < LEAST_SILENCE_SECONDS:
        raise ConfigurationError(f"silence_seconds={silence_seconds:g} is under {LEAST_SILENCE_SECONDS:g}; use more")
    return [
        *_common_options(message_bytes, silence_seconds),
        # A TCP connection per channel: one session's megabytes do not queue behind another's.
        ("grpc.use_local_subchannel_pool", 1),
        # A service that is being restarted is found again within about a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Retries are decided where their meaning is known: a retried evaluation would be charged twice.
        ("grpc.enable_retries", 0),
        # Service addresses are ours; a proxy from the environment would see the traffic's shape.
        ("grpc.enable_http_proxy", 0),
    ]


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
