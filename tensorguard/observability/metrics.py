"""Prometheus metrics every service shares. Labels are names and kinds, never values, users or request ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from tensorguard.errors import ConfigurationError

_MILLISECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 10000)

HE_OP_LATENCY = Histogram(
    "he_op_latency_ms", "Time of one homomorphic operation in milliseconds", ["op"], buckets=_MILLISECONDS
)
# By the names of the frames' operation counts (docs/protocol-session.md).
HE_OPERATIONS: Mapping[str, Counter] = MappingProxyType(
    {
        "ntt": Counter("he_ntt_count", "Number-theoretic transforms, one prime each"),
        "products": Counter("he_product_count", "Products of a ciphertext and a weight polynomial"),
        "additions": Counter("he_addition_count", "Additions of ciphertexts"),
        "rerandomisations": Counter("he_rerandomisation_count", "Encryptions of zero added to responses"),
        "modulus_switches": Counter("he_modulus_switch_count", "Responses switched to the first prime"),
        "rotations": Counter("he_rotation_count", "Ciphertext rotations: none is implemented, so this stays 0"),
        "key_switches": Counter("he_key_switch_count", "Key switches: none is implemented, so this stays 0"),
        "evaluation_key_bytes": Counter(
            "he_evaluation_key_bytes", "Bytes of evaluation keys: no message can carry one, so this stays 0"
        ),
    }
)
HE_ADAPTER_MEMORY = Gauge(
    "he_adapter_memory_bytes", "Transformed weights held for an adapter; all its sessions share them", ["adapter"]
)
HE_BYTES = Counter("he_bytes", "Bytes of evaluation frames, wherever their arrays lie", ["direction"])
HE_FRAMES = Counter("he_frames", "Evaluation requests by transport (inline, shared_memory)", ["transport"])
HE_POOL_LEVEL = Gauge("he_pool_level", "Encryptions of zero that are ready, over all pools of a side", ["side"])
HE_POOL_ELEMENTS = Counter(
    "he_pool_elements",
    "Encryptions of zero that pools made, gave out (taken), lacked (in_line: made by the call itself) or wiped unused",
    ["side", "event"],
)
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
