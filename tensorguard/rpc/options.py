"""gRPC channel arguments that both ends share. Each is here for a reason that is written beside it."""

from __future__ import annotations

import ipaddress

DEFAULT_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message either way. Evaluation frames are kept near 1 MiB; manifests and bases are a few MiB."""

_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000


def common_options(message_bytes: int) -> list[tuple[str, int]]:
    """Arguments of servers and channels alike."""
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # Dead peers behind a silent network are noticed within 40 s, also while no call is open.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(message_bytes: int) -> list[tuple[str, int]]:
    """Arguments of a server."""
    return [
        *common_options(message_bytes),
        # A port in use must be an error, not a silent share of another process's traffic.
        ("grpc.so_reuseport", 0),
        # Accept our own channels' pings, refuse floods of them.
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 3),
        ("grpc.max_metadata_size", 16 * 1024),
    ]


def channel_options(message_bytes: int) -> list[tuple[str, int]]:
    """Arguments of a channel."""
    return [
        *common_options(message_bytes),
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
