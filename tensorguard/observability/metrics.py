"""Prometheus metrics every service shares. Labels are names and kinds, never values, users or request ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from tensorguard.errors import ConfigurationError

_MILLISECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 10000)

HE_OP_LATENCY = Histogram(
    "he_op_latency_ms", "Time of one homomorphic operation in milliseconds", ["op"], buckets=_MILLISECONDS
)
HE_ROTATION_COUNT = Counter("he_rotation_count", "Ciphertext rotations: none is implemented, so this stays 0")
HE_ADAPTER_MEMORY = Gauge(
    "he_adapter_memory_bytes", "Transformed weights held for an adapter; all its sessions share them", ["adapter"]
)
HE_BYTES = Counter("he_bytes", "Bytes of evaluation frames", ["direction"])
TSSP_VERIFY_LATENCY = Histogram(
    "tssp_verify_latency_ms",
    "Time to verify a package's signatures and structure in milliseconds",
    buckets=_MILLISECONDS,
)
TOKENS = Counter(
    "tensafe_tokens",
    "Tokens charged (coprocessor) or generated (inference); rate() gives tokens per second",
    ["kind"],
)


@contextmanager
def measured(observe: Callable[[float], None]) -> Iterator[None]:
    """Observe the block's duration in milliseconds, also when it raises."""
    started = time.perf_counter()
    try:
        yield
    finally:
        observe((time.perf_counter() - started) * 1e3)


def serve_metrics(address: str) -> Callable[[], None]:
    """Serve /metrics on `host:port`; the returned function stops it. Raises ConfigurationError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigurationError(f"metrics address {address!r} is not host:port")
    try:
        server, thread = start_http_server(int(port), host)
    except OSError as error:
        raise ConfigurationError(f"cannot serve metrics on {address} ({error.strerror}): choose another port") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)

    return stop
