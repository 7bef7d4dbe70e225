from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import REGISTRY, generate_latest

from tensorguard.errors import ConfigurationError
from tensorguard.observability import metrics


def test_names_and_rotations_stay_zero() -> None:
    metrics.HE_OP_LATENCY.labels("forward_pass").observe(1.5)
    with metrics.measured(metrics.TSSP_VERIFY_LATENCY.observe):
        pass
    text = generate_latest(REGISTRY).decode()
    zero = ("he_rotation_count_total 0.0", "he_key_switch_count_total 0.0", "he_evaluation_key_bytes_total 0.0")
    for name in ("he_op_latency_ms_bucket", "tssp_verify_latency_ms_count", *zero):
        assert name in text


def test_measured_counts_failures_too() -> None:
    seen: list[float] = []
    with pytest.raises(ValueError), metrics.measured(seen.append):
        raise ValueError
    assert len(seen) == 1 and seen[0] >= 0


def test_serving(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    stop = metrics.serve_metrics(address)
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            assert b"he_rotation_count" in answer.read()
        with pytest.raises(ConfigurationError, match="choose another port"):
            metrics.serve_metrics(address)
    finally:
        stop()


def test_malformed_address() -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        metrics.serve_metrics("nowhere")
