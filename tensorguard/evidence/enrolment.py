"""A service that an operator vouches for (the gateway): gets its certificate with a secret, renews it with itself.

Key and certificate are files, so that a restart needs no new secret.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.crypto.files import read_secret_file, replace_file, write_secret_file
from tensorguard.errors import AuthenticationError, ConfigurationError
from tensorguard.evidence.tls import ATTESTOR, CertifiedKey
from tensorguard.rpc.certificates import ServiceName, private_key_pem
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2, attestor_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity

log = structlog.get_logger(__name__)

KEY_FILE, CERTIFICATE_FILE = "tls.key", "tls.certificate"
_RENEW_AT = 0.5
"""Share of its life after which a certificate is renewed: the attestor may be away for the other half."""
_SECONDS = 10.0


class EnrolledService:
    """Key and certificate of one enrolled service, in a directory."""

    def __init__(
        self, name: ServiceName, attestor: str, authority: Path, directory: Path, secret_file: Path | None = None
    ) -> None:
        """`secret_file`: the enrolment secret, for the first start. Raises ConfigurationError; asks nobody yet."""
        self._name = name
        self._attestor = attestor
        self._directory = directory
        self._secret_file = secret_file
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make {directory}: {error.strerror}") from None
        self.tls = CertifiedKey.read(authority, _load_or_make_key(directory / KEY_FILE))
        self._renew_at = 0.0
        self._load_certificate()

    def identity(self) -> TlsIdentity:
        """What to show in TLS. Raises UnavailableError without a certificate that has not ended."""
        return self.tls.identity()

    def refresh(self) -> bool:
        """Enrol, or renew the certificate where half of its life is over; whether it, or the authority's file, is new.

        Raises ConfigurationError where there is no secret to enrol with, AuthenticationError for one that is not good
        any more, UnavailableError while the attestor cannot be reached.
        """
        changed, now = self.tls.reload(), self.tls.now()
        if now < self._renew_at:
            return changed
        if self.tls.ends_at > now:
            self._renew()
        else:
            self._enrol()
        log.info("certificate", service=str(self._name), ends_at=int(self.tls.ends_at))
        return True

    def _enrol(self) -> None:
        if self._secret_file is None:
            raise ConfigurationError(
                f"{self._directory} has no certificate that has not ended: make a secret with tensafe attestor enrol, "
                "and name its file as enrolment_secret_file"
            )
        secret = read_secret_file(self._secret_file).decode("utf-8", "replace").strip()
        with open_channel(self._attestor, tls=ChannelTls(self.tls.authority, ATTESTOR)) as channel:
            request = attestor_pb2.EnrolRequest(secret=secret, certificate_request=self.tls.request())
            try:
                answer = attestor_pb2_grpc.AttestorServiceStub(channel).Enrol(request, timeout=_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, f"attestor {self._attestor}") from None
        self._take(answer.certificate, answer.mutual_port)

    def _renew(self) -> None:
        endpoint = f"{self._attestor.rpartition(':')[0]}:{self.tls.mutual_port}"
        tls = ChannelTls(self.tls.authority, ATTESTOR, self.tls.identity())
        with open_channel(endpoint, tls=tls) as channel:
            request = attestor_pb2.RenewCertificateRequest(certificate_request=self.tls.request())
            try:
                answer = attestor_pb2_grpc.AttestorServiceStub(channel).RenewCertificate(request, timeout=_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, f"attestor {endpoint}") from None
        self._take(answer.certificate, self.tls.mutual_port)

    def _take(self, certificate: bytes, mutual_port: int) -> None:
        self.tls.accept(certificate, self._name, mutual_port)
        # The port first: renewal needs it.
        file = self._directory / CERTIFICATE_FILE
        try:
            replace_file(file, mutual_port.to_bytes(2, "big") + certificate)
        except OSError as error:
            raise ConfigurationError(f"cannot write {file}: {error.strerror}") from None
        self._plan(certificate)

    def _load_certificate(self) -> None:
        try:
            data = (self._directory / CERTIFICATE_FILE).read_bytes()
        except FileNotFoundError:
            return
        try:
            self.tls.accept(data[2:], self._name, int.from_bytes(data[:2], "big"))
            self._plan(data[2:])
        except AuthenticationError as error:
            log.warning("kept certificate is of no use", why=error.message)  # the way on is to enrol again

    def _plan(self, certificate: bytes) -> None:
        begins = x509.load_der_x509_certificate(certificate).not_valid_before_utc.timestamp()
        self._renew_at = begins + _RENEW_AT * (self.tls.ends_at - begins)


def _load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_secret_file(path, private_key_pem(key))
        return key
    try:
        read = serialization.load_pem_private_key(read_secret_file(path), None)
    except (ValueError, TypeError):
        read = None
    if not isinstance(read, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{path} is not the key of a service; remove it to make another, and enrol again")
    return read
