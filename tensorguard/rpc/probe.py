"""`python -m tensorguard.rpc.probe ADDRESS`: exit code 0 if a service says it is healthy. For container checks."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tensorguard.rpc.channel import open_channel

SECONDS = 5.0


def grpc_healthy(address: str) -> bool:
    """Whether the gRPC server at host:port reports SERVING."""
    with open_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def http_healthy(url: str) -> bool:
    """Whether an HTTP GET is answered with 200."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - the scheme is checked
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("address", help="host:port of a gRPC server, or a URL with --http")
    parser.add_argument("--http", action="store_true", help="the address is a URL that must answer 200")
    options = parser.parse_args()
    healthy = http_healthy(options.address) if options.http else grpc_healthy(options.address)
    raise SystemExit(0 if healthy else 1)


if __name__ == "__main__":
    main()
