"""Mutual TLS between services: credentials of servers and channels, and who is at the other end.

Certificates are short-lived, so nothing here holds one: servers ask for the present identity at every connection, and
who opens a channel asks when it opens one. A connection outlives the certificates it was made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from cryptography import x509

from tensorguard.errors import AuthenticationError
from tensorguard.rpc.certificates import MAX_CERTIFICATE_BYTES, ServiceName, read_name


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What a service shows of itself in TLS, and the authority by which it knows others. All PEM."""

    private_key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """How a channel is made: whom it may reach, and as whom.

    authority: PEM certificate that the server's must be by.
    expected: the server must be this service; of any tenant, where that is empty.
    identity: shown to the server; None for callers that have no certificate yet.
    """

    authority: bytes
    expected: ServiceName
    identity: TlsIdentity | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For `grpc.secure_channel`."""
        own = self.identity
        return grpc.ssl_channel_credentials(
            self.authority,
            None if own is None else own.private_key,
            None if own is None else own.certificate,
        )

    def options(self) -> list[tuple[str, str]]:
        """Channel arguments: the name that TLS looks for in the server's certificate, in place of the address."""
        return [("grpc.ssl_target_name_override", self.expected.dns_name)]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called, by a certificate that TLS has verified."""

    name: ServiceName
    certificate: x509.Certificate


def server_credentials(identity: Callable[[], TlsIdentity], *, mutual: bool = True) -> grpc.ServerCredentials:
    """Credentials of a server that shows, at each connection, what `identity` then returns.

    mutual: only callers with a certificate by the same authority are let in. `identity` must answer at once: it is
    asked while a connection waits; where it raises, gRPC shows what it has, which peers refuse once it has ended.
    """
    present = [identity()]

    def fetch() -> Any:
        fresh = identity()
        if fresh is present[0]:
            return None  # gRPC keeps what it has
        present[0] = fresh
        return _configuration(fresh, mutual)

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        _configuration(present[0], mutual), fetch, require_client_authentication=mutual
    )
    return credentials


def peer_of(auth_context: Mapping[str, Any]) -> Peer | None:
    """Who is at the other end, None without a certificate. Raises AuthenticationError for one that is no service's."""
    found = auth_context.get("x509_pem_cert")
    if not found:
        return None
    pem = bytes(found[0])
    try:
        if len(pem) > 2 * MAX_CERTIFICATE_BYTES:
            raise ValueError("too large")
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise AuthenticationError("the caller's certificate cannot be read") from None
    return Peer(read_name(certificate), certificate)


def _configuration(identity: TlsIdentity, mutual: bool) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(identity.private_key, identity.certificate)], identity.authority if mutual else None
    )
