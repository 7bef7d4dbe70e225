"""Issues the certificates of services: attested ones with their token, a gateway for an operator's word."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.attestor.decisions import Decisions
from tensorguard.errors import AuthenticationError, ConfigurationError, InvalidInputError, PermissionDeniedError
from tensorguard.evidence.identity import thumbprint
from tensorguard.evidence.tls import ATTESTOR
from tensorguard.rpc.certificates import ServiceName, check_issued, private_key_pem, read_request
from tensorguard.rpc.tls import Peer, TlsIdentity
from tensorguard.store.authority import Authorities
from tensorguard.store.enrolments import ENROLLED_ROLES, use_enrolment
from tensorguard.store.revocations import check_workload_not_revoked

ENROLLED_SECONDS = 86_400
"""Life of a certificate that an operator vouches for; renewed with itself, and so for ever while its holder runs."""
_OWN_SECONDS = 3600


class CertificateIssuer:
    """Decides who gets a certificate, and with which name. Without TLS nobody does."""

    def __init__(
        self,
        authorities: Authorities | None,
        decisions: Decisions,
        *,
        enrolled_seconds: int = ENROLLED_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authorities = authorities
        self._decisions = decisions
        self._enrolled_seconds = enrolled_seconds
        self._clock = clock

    def attested(self, request: bytes, name: ServiceName, now: float, expires_at: int) -> bytes:
        """For a workload that is being attested: DER, until its token ends. Recorded with the attestation."""
        return self._issue(read_request(request), name, now, expires_at - now)

    def enrol(self, secret: str, request: bytes, *, peer: str) -> bytes:
        """For who has an enrolment secret: DER. The secret is used up. Raises AuthenticationError."""
        with self._decisions.deciding("enrol", peer) as record:
            self._require_tls()
            key = read_request(request)  # a malformed one must not cost the secret
            with record.accepting() as connection:
                now = self._clock()
                name = use_enrolment(connection, secret, int(now))
                certificate = self._issue(key, name, now, self._enrolled_seconds)
                record.update(role=name.role, tenant=name.tenant, certificate_sha256=_digest(certificate))
                record.update(holder=thumbprint(key))
        return certificate

    def renew(self, caller: Peer | None, request: bytes, *, peer: str) -> bytes:
        """For an enrolled service that calls with its certificate: DER, with the same name for the same key.

        Raises AuthenticationError, PermissionDeniedError, InvalidInputError, RevokedError.
        """
        with self._decisions.deciding("renew_certificate", peer) as record:
            authorities, now = self._require_tls(), self._clock()
            if caller is None:
                raise AuthenticationError("a certificate is renewed with itself: call the address that asks for it")
            name = caller.name
            record.update(role=name.role, tenant=name.tenant)
            if name.role not in ENROLLED_ROLES:
                raise PermissionDeniedError("attested services get their certificates by attesting again")
            # A connection may be older than the certificate's end.
            check_issued(caller.certificate, (item.certificate for item in authorities.trusted()), now)
            record.authenticated = True
            key = read_request(request)
            if key != caller.certificate.public_key():
                raise InvalidInputError("a certificate is renewed for its own key; enrol again for another one")
            holder = thumbprint(key)
            certificate = self._issue(key, name, now, self._enrolled_seconds)
            record.update(holder=holder, certificate_sha256=_digest(certificate))
            with record.accepting() as connection:
                check_workload_not_revoked(connection, holder, set(), ())
        return certificate

    def _issue(self, key: ec.EllipticCurvePublicKey, name: ServiceName, now: float, life_seconds: float) -> bytes:
        certificate = self._require_tls().current.issue(key, name, now=now, life_seconds=life_seconds)
        return certificate.public_bytes(serialization.Encoding.DER)

    def _require_tls(self) -> Authorities:
        if self._authorities is None:
            raise ConfigurationError("this attestor runs without TLS and certifies nobody: set mutual_listen")
        return self._authorities


class OwnCertificate:
    """The attestor's own certificate, which it makes anew in time, and in each step of a rotation."""

    def __init__(self, authorities: Authorities, *, clock: Callable[[], float] = time.time) -> None:
        self._authorities = authorities
        self._clock = clock
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._made_at = 0.0
        self._identity: TlsIdentity | None = None
        self._issuer = b""

    def identity(self) -> TlsIdentity:
        """What to show in TLS now."""
        now, issuer, trusted = self._clock(), self._authorities.current, self._authorities.pem
        young = 0 <= now - self._made_at < _OWN_SECONDS / 2
        if self._identity is None or not young or (self._issuer, self._identity.authority) != (issuer.pem, trusted):
            certificate = issuer.issue(self._key.public_key(), ATTESTOR, now=now, life_seconds=_OWN_SECONDS)
            self._identity = TlsIdentity(private_key_pem(self._key), _pem_of(certificate), trusted)
            self._made_at, self._issuer = now, issuer.pem
        return self._identity


def _pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
