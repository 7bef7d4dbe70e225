"""A workload's TLS key, the certificate that attestation brings for it, and what both are used for.

The key is in the report data of the evidence, and the certificate ends with the token that came with it: who has it was
attested minutes ago.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import AuthenticationError, ConfigurationError, TenSafeError, UnavailableError
from tensorguard.evidence.result import AttestationResult
from tensorguard.rpc.certificates import (
    MAX_CERTIFICATE_BYTES,
    ServiceName,
    check_issued,
    make_request,
    private_key_pem,
    public_key_info,
    read_authorities,
    read_name,
)
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.tls import ChannelTls, Peer, TlsIdentity

log = structlog.get_logger(__name__)

ATTESTOR = ServiceName("attestor")
_AHEAD_SECONDS = 30.0
"""A channel is replaced so long before the certificate that it would connect with again has ended."""


class CertifiedKey:
    """A TLS key and its newest certificate. Safe for threads; shows nothing of the private key."""

    def __init__(
        self,
        authority: bytes,
        key: ec.EllipticCurvePrivateKey | None = None,
        *,
        clock: Callable[[], float] = time.time,
        authority_file: Path | None = None,
    ) -> None:
        """`authority`: PEM certificate, or certificates in a rotation; `authority_file`: what `reload` looks at. A new
        key is made unless one is given. Raises ConfigurationError.
        """
        self.authority = authority
        self._issuers = read_authorities(authority)
        self._authority_file = authority_file
        self._key = key if key is not None else ec.generate_private_key(ec.SECP256R1())
        self._clock = clock
        self.public_key = public_key_info(self._key.public_key())
        """SubjectPublicKeyInfo, DER."""
        self._present: tuple[TlsIdentity, float] | None = None
        self.mutual_port = 0
        """Where the attestor wants the certificate; 0 before there is one."""

    @classmethod
    def read(cls, authority_file: Path, key: ec.EllipticCurvePrivateKey | None = None) -> CertifiedKey:
        """With the authority in this file. Raises ConfigurationError that names it."""
        try:
            return cls(authority_file.read_bytes(), key, authority_file=authority_file)
        except OSError as error:
            raise ConfigurationError(f"cannot read {authority_file}: {error.strerror}") from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{authority_file}: {error.message}") from None

    def now(self) -> float:
        """By the clock that certificates are judged by, Unix seconds."""
        return self._clock()

    def reload(self) -> bool:
        """Take what the authority's file has by now, for a rotation; whether it is something else.

        A file of no use is logged, and leaves what is trusted as it is: half-written ones must not end a service.
        """
        if self._authority_file is None:
            return False
        try:
            fresh = CertifiedKey.read(self._authority_file, self._key)
        except ConfigurationError as error:
            log.warning("authority file not read again", cause=error.message)
            return False
        if fresh.authority == self.authority:
            return False
        self.authority, self._issuers = fresh.authority, fresh._issuers
        if self._present is not None:
            identity, ends_at = self._present
            self._present = replace(identity, authority=self.authority), ends_at
        log.info("authority file read again", authorities=len(self._issuers))
        return True

    def request(self) -> bytes:
        """A PKCS #10 request for the key, DER."""
        return make_request(self._key)

    def accept(self, certificate: bytes, name: ServiceName, mutual_port: int) -> None:
        """Use this certificate (DER) from now on.

        Raises AuthenticationError unless it is by the authority, in time, for this key and for this name.
        """
        try:
            if len(certificate) > MAX_CERTIFICATE_BYTES:
                raise ValueError("too large")
            read = x509.load_der_x509_certificate(certificate)
            key = read.public_key()
        except (ValueError, x509.InvalidVersion):
            raise AuthenticationError("the attestor did not answer with a certificate") from None
        check_issued(read, self._issuers, self._clock())
        if not isinstance(key, ec.EllipticCurvePublicKey) or public_key_info(key) != self.public_key:
            raise AuthenticationError("the attestor certified another key")
        if read_name(read) != name:
            raise AuthenticationError(f"the attestor certified {read_name(read)}, not {name}")
        identity = TlsIdentity(
            private_key_pem(self._key), read.public_bytes(serialization.Encoding.PEM), self.authority
        )
        self.mutual_port = mutual_port
        self._present = identity, read.not_valid_after_utc.timestamp()

    def identity(self) -> TlsIdentity:
        """What to show in TLS. Raises UnavailableError before there is a certificate and after it has ended."""
        if self._present is None or self._clock() >= self._present[1]:
            raise UnavailableError("there is no certificate of this service that has not ended: is the attestor there?")
        return self._present[0]

    @property
    def ends_at(self) -> float:
        """When the certificate ends, Unix seconds; 0 without one."""
        return 0.0 if self._present is None else self._present[1]

    def __repr__(self) -> str:
        return f"CertifiedKey({hashlib.sha256(self.public_key).hexdigest()[:16]})"

    def __reduce__(self) -> str:
        raise TypeError("a TLS key stays in its process")


def check_channel(peer: Peer | None, result: AttestationResult) -> None:
    """Raises AuthenticationError when a connection's certificate is not for the TLS key that the token names.

    A certificate is for a role and a tenant; this makes the connection that very workload's. None (development, without
    TLS) has nothing to compare.
    """
    if peer is None:
        return
    key = peer.certificate.public_key()
    if (
        not isinstance(key, ec.EllipticCurvePublicKey)
        or hashlib.sha256(public_key_info(key)).hexdigest() != result.tls_key_sha256
    ):
        raise AuthenticationError("the connection's certificate is not the one of the workload that the token names")


class MutualChannel:
    """The channel to the attestor's address for callers with a certificate, made anew before the certificate ends.

    The one before stays open for what runs on it, until the next change.
    """

    def __init__(self, endpoint: str, tls: CertifiedKey, clock: Callable[[], float]) -> None:
        self._host = endpoint.rpartition(":")[0]
        self._tls = tls
        self._clock = clock
        self._lock = threading.Lock()
        self._channels: list[tuple[grpc.Channel, float]] = []
        self._authority = b""

    def channel(self) -> grpc.Channel:
        """Raises UnavailableError while there is no certificate."""
        with self._lock:
            ending = not self._channels or self._clock() >= self._channels[-1][1] - _AHEAD_SECONDS
            if ending or self._authority != self._tls.authority:
                self._open()
            return self._channels[-1][0]

    def close(self) -> None:
        """Close the channels."""
        with self._lock:
            for channel, _ in self._channels:
                channel.close()
            self._channels.clear()

    def _open(self) -> None:
        tls = ChannelTls(self._tls.authority, ATTESTOR, self._tls.identity())
        if self._authority == tls.authority and self._channels[-1][1] >= self._tls.ends_at:
            return  # there is no newer certificate yet
        channel = open_channel(f"{self._host}:{self._tls.mutual_port}", tls=tls)
        self._channels.append((channel, self._tls.ends_at))
        self._authority = tls.authority
        while len(self._channels) > 2:
            self._channels.pop(0)[0].close()


class CertificateKeeper:
    """One background thread that has the certificate of a server renewed in time, whether anybody calls or not."""

    def __init__(self, renew: Callable[[], object], seconds: float = 1.0) -> None:
        """`renew` is called every so many seconds; it does nothing while the certificate is young."""
        self._renew = renew
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="certificate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no longer."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._renew()
            except TenSafeError as error:
                log.warning("certificate not renewed", reason=error.reason, cause=error.message)
            except Exception as error:  # the thread must live: without it nobody can connect any more
                log.error("certificate keeper failed", error_type=type(error).__name__)
