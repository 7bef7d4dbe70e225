"""`python -m tensorguard.rpc.probe ADDRESS`: exit code 0 if a service says it is healthy. For container checks.

A service that demands certificates is asked at its `health_listen` address, which answers nothing but this.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tensorguard.errors import TenSafeError, UnavailableError
from tensorguard.rpc.channel import open_channel

SECONDS = 5.0


def check_grpc(address: str) -> None:
    """Raises UnavailableError, which says why, unless the gRPC server at host:port reports SERVING."""
    with open_channel(address, plaintext_network=True) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError:
            if _speaks_tls(address):
                raise UnavailableError(
                    f"{address} speaks TLS: give the service a health_listen address, and ask that one"
                ) from None
            raise UnavailableError(f"no service answers at {address}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnavailableError(f"the service at {address} does not serve")


def check_http(url: str) -> None:
    """Raises UnavailableError, which says why, unless an HTTP GET is answered with 200."""
    if not url.startswith(("http://", "https://")):
        raise UnavailableError("with --http the address begins with http:// or https://")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - the scheme is checked
            if answer.status != 200:
                raise UnavailableError(f"{url} answers with status {answer.status}")
    except (urllib.error.URLError, OSError) as error:
        raise UnavailableError(f"{url} does not answer ({error})") from None


def _speaks_tls(address: str) -> bool:
    """Whether something completes a handshake there. Nothing is sent; nobody is believed."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as connection,
            context.wrap_socket(connection),
        ):
            return True
    except (OSError, ValueError):
        return False


def main() -> int:
    """0 if the service is healthy; 1 with one line on stderr that says why it is not."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("address", help="host:port of a gRPC server, or a URL with --http")
    parser.add_argument("--http", action="store_true", help="the address is a URL that must answer 200")
    options = parser.parse_args()
    try:
        (check_http if options.http else check_grpc)(options.address)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
