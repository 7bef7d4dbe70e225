"""Certificates of attested and of enrolled services, over TLS with a real attestor, with attacks."""

from __future__ import annotations

import json
import pickle
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from services.attestor.certificates import ENROLLED_SECONDS, OwnCertificate
from services.attestor.server import build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import (
    AuthenticationError,
    ConfigurationError,
    InternalError,
    InvalidInputError,
    PermissionDeniedError,
    RevokedError,
    TenSafeError,
    UnavailableError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.enrolment import CERTIFICATE_FILE, KEY_FILE, EnrolledService
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.release import release_transcript
from tensorguard.evidence.report_data import binding
from tensorguard.evidence.tls import ATTESTOR, CertifiedKey
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.certificates import Authority, ServiceName, make_request, public_key_info, read_name
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity
from tensorguard.store.revocations import RevocationKind
from tests.support.tls import tls_identity

from .conftest import CONTENT_KEY, Bench, Clock
from .test_revocation import revoke_now

GATEWAY = ServiceName("gateway")


class TlsBench(Bench):
    """The same with TLS."""

    def settings(self) -> AttestorSettings:
        return super().settings().model_copy(update={"mutual_listen": "127.0.0.1:0"})

    @property
    def authority(self) -> Authority:
        return self.attestor.state.authority

    def client(self, thumbprint: str | None = None) -> AttestorClient:
        client = AttestorClient(
            self.attestor.server.address,
            thumbprint=thumbprint or self.state.attestor_thumbprint,
            tls=CertifiedKey(self.authority.pem, clock=self.clock),
            clock=self.clock,
        )
        self._clients.append(client)
        return client

    def call(self, method: str, message: Any, identity: TlsIdentity | None, *, mutual: bool = True) -> Any:
        """One call, with this certificate or none. Raises the TenSafe error it is answered with."""
        server = self.attestor.server
        address = server.further_address if mutual else server.address
        with open_channel(address, tls=ChannelTls(self.authority.pem, ATTESTOR, identity)) as channel:
            try:
                answer = getattr(attestor_pb2_grpc.AttestorServiceStub(channel), method)(message, timeout=5)
                return next(answer) if method == "WatchRevocations" else answer
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None


@pytest.fixture
def tls_bench(tmp_path: Path, clock: Clock) -> Iterator[TlsBench]:
    made = TlsBench(tmp_path, clock)
    yield made
    made.stop()


def certified(workload: Workload) -> tuple[TlsIdentity, x509.Certificate]:
    workload.token()
    assert workload.client.tls is not None
    identity = workload.client.tls.identity()
    return identity, x509.load_pem_x509_certificate(identity.certificate)


def release_message(bench: Bench, workload: Workload) -> pb.ReleaseKeyRequest:
    nonce, token = secrets.token_bytes(32), workload.token()
    signed = release_transcript(bench.state.attestor_thumbprint, token, bench.release, 10, nonce)
    return pb.ReleaseKeyRequest(
        token=token,
        manifest_digest=bench.release.manifest_digest,
        package_id=bench.release.package_id,
        sequence=bench.release.sequence,
        tokens_wanted=10,
        signature=workload.identity.sign(signed),
        request_nonce=nonce,
    )


def last_record(bench: Bench, event: str) -> dict[str, Any]:
    return next(item for line in reversed(bench.audit_lines) if (item := json.loads(line))["event"] == event)


# Attested workloads


@pytest.mark.parametrize("role", list(Role))
def test_a_certificate_comes_with_the_token_and_ends_with_it(tls_bench: TlsBench, role: Role) -> None:
    workload = tls_bench.workload(role=role)
    _, certificate = certified(workload)
    result = workload.client.verifier().verify(workload.token())
    assert read_name(certificate) == ServiceName(role.value, "tenant")
    assert certificate.not_valid_after_utc.timestamp() == result.expires_at
    assert last_record(tls_bench, "attest")["certificate_sha256"]


def test_keys_are_released_over_mutual_tls(tls_bench: TlsBench) -> None:
    workload = tls_bench.workload()
    released = workload.release_key(tls_bench.release, tokens_wanted=10)
    assert released.content_key == CONTENT_KEY
    workload.renew(released.terms.lease_id, tokens_used=5, tokens_wanted=10)
    revoke_now(tls_bench, RevocationKind.PACKAGE, "tenant", "package")
    assert next(workload.watch_revocations(0)).package_id == "package"


def test_a_workload_renews_its_certificate_with_its_token(tls_bench: TlsBench, clock: Clock) -> None:
    """TLS has the machine's clock, so only the first connection is made here; the token of the next is by then new."""
    workload = tls_bench.workload()
    _, first = certified(workload)
    workload.release_key(tls_bench.release, tokens_wanted=10)
    clock.now += 250
    _, second = certified(workload)
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert second.public_key() == first.public_key()
    assert workload.release_key(tls_bench.release, tokens_wanted=10).content_key == CONTENT_KEY


@pytest.mark.parametrize("method", ["ReleaseKey", "RenewLease", "WatchRevocations", "RenewCertificate"])
def test_methods_for_certified_callers_are_refused_to_others(tls_bench: TlsBench, method: str) -> None:
    kind = getattr(pb, f"{method}Request")

    def call(identity: TlsIdentity | None, mutual: bool) -> None:
        tls_bench.call(method, kind(), identity, mutual=mutual)

    identity, _ = certified(tls_bench.workload())
    for shown in (None, identity):  # the first address never asks for one
        with pytest.raises(AuthenticationError, match="certificate"):
            call(shown, False)
    foreign = tls_identity(Authority.generate(tls_bench.clock()), ServiceName("coprocessor", "tenant"))
    ended = tls_identity(tls_bench.authority, ServiceName("coprocessor", "tenant"), ago=1000, life=900)
    for bad in (None, TlsIdentity(foreign.private_key, foreign.certificate, tls_bench.authority.pem), ended):
        with pytest.raises(UnavailableError):
            call(bad, True)
    with pytest.raises(PermissionDeniedError, match="not for the role attestor"):
        call(tls_identity(tls_bench.authority, ATTESTOR), True)


def test_a_host_gets_no_key_with_its_certificate(tls_bench: TlsBench) -> None:
    workload = tls_bench.workload(role=Role.INFERENCE)
    identity, _ = certified(workload)
    with pytest.raises(PermissionDeniedError, match="not for the role inference"):
        tls_bench.call("ReleaseKey", release_message(tls_bench, workload), identity)


def test_a_whole_request_is_refused_on_another_workloads_connection(tls_bench: TlsBench) -> None:
    """Token and signature are right, and the thief is an attested coprocessor of the same tenant."""
    victim, thief = tls_bench.workload(), tls_bench.workload()
    message = release_message(tls_bench, victim)
    with pytest.raises(AuthenticationError, match="not the one of the workload"):
        tls_bench.call("ReleaseKey", message, certified(thief)[0])
    assert last_record(tls_bench, "release")["reason"] == "authentication"
    assert tls_bench.call("ReleaseKey", message, certified(victim)[0]).sealed_key


def test_a_certificate_is_for_the_attested_key_only(tls_bench: TlsBench) -> None:
    """Evidence is bound to one TLS key; the request for a certificate is for another."""
    identity = WorkloadIdentity.generate()
    attested, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def attest(request: bytes, tls_key: bytes = public_key_info(attested.public_key())) -> bytes:
        nonce = tls_bench.call("CreateNonce", pb.CreateNonceRequest(), None, mutual=False).nonce
        bound = binding(
            nonce,
            identity.public,
            attestor_thumbprint=tls_bench.state.attestor_thumbprint,
            tenant="tenant",
            role=Role.COPROCESSOR,
            package_id="package",
            tls_key=public_key_info(attested.public_key()),
        )
        message = pb.AttestRequest(
            nonce=nonce,
            evidence_kind="simulated",
            evidence=tls_bench.platform().collect(bound, Role.COPROCESSOR).evidence,
            signing_key=identity.public.signing_key,
            hpke_key=identity.public.hpke_key,
            tls_key=tls_key,
            tenant="tenant",
            role=pb.ROLE_COPROCESSOR,
            package_id="package",
            certificate_request=request,
        )
        certificate: bytes = tls_bench.call("Attest", message, None, mutual=False).certificate
        return certificate

    assert attest(make_request(attested))
    with pytest.raises(InvalidInputError, match="another key"):
        attest(make_request(other))
    with pytest.raises(InvalidInputError, match="another key"):
        attest(make_request(attested), b"")
    with pytest.raises(TenSafeError) as refused:
        attest(make_request(other), public_key_info(other.public_key()))
    assert refused.value.reason == "evidence_refused"
    assert last_record(tls_bench, "attest")["detail"] == "report_data_mismatch"
    forged = bytearray(make_request(attested))
    forged[-1] ^= 1
    with pytest.raises(InvalidInputError):
        attest(bytes(forged))


def test_an_attestor_without_tls_certifies_nobody(bench: Bench, tmp_path: Path) -> None:
    key = CertifiedKey(bench.attestor.state.authority.pem)
    client = AttestorClient(
        bench.attestor.server.address,
        tls=key,
        channel=open_channel(bench.attestor.server.address),
        clock=bench.clock,
    )
    with pytest.raises(ConfigurationError, match="mutual_listen"):
        client.attest(
            WorkloadIdentity.generate(), bench.platform(), role=Role.COPROCESSOR, tenant="tenant", package_id="package"
        )
    with pytest.raises(UnavailableError, match="no certificate"):
        key.identity()
    client.close()


def test_the_attestor_must_be_by_the_authority(tls_bench: TlsBench) -> None:
    other = Authority.generate(tls_bench.clock())
    client = AttestorClient(tls_bench.attestor.server.address, tls=CertifiedKey(other.pem))
    with pytest.raises(UnavailableError):
        client.jwks()
    client.close()


def test_plaintext_is_not_answered(tls_bench: TlsBench) -> None:
    for address in (tls_bench.attestor.server.address, tls_bench.attestor.server.further_address):
        client = AttestorClient(address)
        with pytest.raises(UnavailableError):
            client.jwks()
        client.close()


# What a workload takes for its certificate


def test_a_workload_takes_only_its_own_certificate(tls_bench: TlsBench, clock: Clock) -> None:
    name, key = ServiceName("coprocessor", "tenant"), ec.generate_private_key(ec.SECP256R1())
    tls = CertifiedKey(tls_bench.authority.pem, key, clock=clock)

    def take(authority: Authority = tls_bench.authority, **changes: Any) -> None:
        values = {"key": key.public_key(), "name": name, "now": clock(), "life_seconds": 300} | changes
        issued = authority.issue(values["key"], values["name"], now=values["now"], life_seconds=values["life_seconds"])
        tls.accept(issued.public_bytes(Encoding.DER), name, 1)

    for changes, why in (
        ({"authority": Authority.generate(clock())}, "authority"),
        ({"key": ec.generate_private_key(ec.SECP256R1()).public_key()}, "another key"),
        ({"name": ServiceName("coprocessor", "other")}, "certified coprocessor of other"),
        ({"name": ServiceName("inference", "tenant")}, "certified inference of tenant"),
        ({"now": clock() - 1000}, "clocks"),
        ({"now": clock() + 1000}, "clocks"),
    ):
        with pytest.raises(AuthenticationError, match=why):
            take(**changes)
    for bad in (b"", b"x", bytes(10_000)):
        with pytest.raises(AuthenticationError, match="did not answer with a certificate"):
            tls.accept(bad, name, 1)
    with pytest.raises(UnavailableError):
        tls.identity()
    take()
    assert tls.identity().certificate
    clock.now += 300
    with pytest.raises(UnavailableError):
        tls.identity()


def test_a_tls_key_stays_in_its_process(tls_bench: TlsBench) -> None:
    key = CertifiedKey(tls_bench.authority.pem)
    assert "PRIVATE" not in repr(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)


# Services that an operator vouches for


@pytest.fixture
def enrolment(tls_bench: TlsBench, tmp_path: Path) -> Iterator[Enrolment]:
    yield Enrolment(tls_bench, tmp_path)


class Enrolment:
    """A gateway's files."""

    def __init__(self, bench: TlsBench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.authority = folder / "authority.pem"
        self.authority.write_bytes(bench.authority.pem)

    def secret(self, text: str | None = None) -> Path:
        path = self.folder / f"secret-{secrets.token_hex(4)}"
        path.write_text((self.bench.attestor.state.enrol(GATEWAY, 60) if text is None else text) + "\n")
        path.chmod(0o600)
        return path

    def service(self, secret: Path | None, directory: str = "gateway") -> EnrolledService:
        address = self.bench.attestor.server.address
        return EnrolledService(GATEWAY, address, self.authority, self.folder / directory, secret)


def test_a_gateway_enrols_once_and_finds_its_certificate_again(enrolment: Enrolment) -> None:
    secret = enrolment.secret()
    gateway = enrolment.service(secret)
    assert gateway.refresh()
    assert not gateway.refresh()
    certificate = x509.load_pem_x509_certificate(gateway.identity().certificate)
    assert read_name(certificate) == GATEWAY
    record = last_record(enrolment.bench, "enrol")
    assert (record["decision"], record["role"]) == ("accepted", "gateway")
    again = enrolment.service(None)
    assert not again.refresh()
    assert again.identity().certificate == gateway.identity().certificate
    assert (enrolment.folder / "gateway" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    with pytest.raises(AuthenticationError, match="was used"):
        enrolment.service(secret, "second").refresh()


def test_secrets_that_are_not_good(enrolment: Enrolment, clock: Clock) -> None:
    for text in ("", "guess", "x" * 1000):
        with pytest.raises(AuthenticationError, match="enrolment secret"):
            enrolment.service(enrolment.secret(text)).refresh()
    late = enrolment.secret()
    clock.now += 60
    with pytest.raises(AuthenticationError, match="expired"):
        enrolment.service(late).refresh()
    with pytest.raises(ConfigurationError, match="enrolment_secret_file"):
        enrolment.service(None).refresh()


def test_a_malformed_request_does_not_cost_the_secret(enrolment: Enrolment) -> None:
    secret = enrolment.secret()
    message = pb.EnrolRequest(secret=secret.read_text().strip(), certificate_request=b"x")
    with pytest.raises(InvalidInputError):
        enrolment.bench.call("Enrol", message, None, mutual=False)
    assert enrolment.service(secret).refresh()


def test_the_request_is_checked_before_any_secret_is_looked_for(enrolment: Enrolment) -> None:
    """So nothing about a secret can depend on what comes with it."""
    message = pb.EnrolRequest(secret="guess", certificate_request=b"x")
    with pytest.raises(InvalidInputError):
        enrolment.bench.call("Enrol", message, None, mutual=False)
    assert last_record(enrolment.bench, "enrol")["reason"] == "invalid_input"


def test_a_certificate_that_cannot_be_issued_does_not_cost_the_secret(
    enrolment: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the attestor fails after it has taken the secret: both are one transaction."""

    def fail(*_: Any, **__: Any) -> x509.Certificate:
        raise OSError

    secret = enrolment.secret()
    with monkeypatch.context() as broken, pytest.raises(InternalError):
        broken.setattr(Authority, "issue", fail)
        enrolment.service(secret).refresh()
    assert enrolment.service(secret).refresh()
    with pytest.raises(AuthenticationError, match="was used"):
        enrolment.service(secret, "second").refresh()


def test_a_gateway_renews_its_certificate_with_itself(enrolment: Enrolment, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    first = x509.load_pem_x509_certificate(gateway.identity().certificate)
    enrolment.bench.clock.now += 30
    gateway._renew_at = 0.0
    assert gateway.refresh()
    second = x509.load_pem_x509_certificate(gateway.identity().certificate)
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert read_name(second) == GATEWAY and second.public_key() == first.public_key()
    assert last_record(enrolment.bench, "renew_certificate")["decision"] == "accepted"


def test_a_revoked_gateway_does_not_renew(enrolment: Enrolment) -> None:
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    holder = last_record(enrolment.bench, "enrol")["holder"]
    revoke_now(enrolment.bench, RevocationKind.WORKLOAD, value=holder)
    gateway._renew_at = 0.0
    with pytest.raises(RevokedError):
        gateway.refresh()
    assert last_record(enrolment.bench, "renew_certificate")["detail"] == "workload_revoked"


def test_a_certificate_is_not_renewed_for_another_key(enrolment: Enrolment) -> None:
    """Else who is revoked by the key would go on with the next."""
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    request = make_request(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(InvalidInputError, match="own key"):
        enrolment.bench.call(
            "RenewCertificate", pb.RenewCertificateRequest(certificate_request=request), gateway.identity()
        )


def test_a_gateway_renews_at_half_of_the_life(enrolment: Enrolment, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    renewed: list[float] = []
    monkeypatch.setattr(gateway, "_renew", lambda: renewed.append(now))
    start = gateway.tls.now()
    for share, expected in ((0.4, 0), (0.6, 1)):
        now = start + share * ENROLLED_SECONDS
        monkeypatch.setattr(gateway.tls, "now", lambda: now)  # noqa: B023
        gateway.refresh()
        assert len(renewed) == expected


def test_a_certificate_that_has_ended_is_not_renewed(enrolment: Enrolment) -> None:
    """Also not over a connection that is older than its end."""
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    bench = enrolment.bench
    message = pb.RenewCertificateRequest(certificate_request=gateway.tls.request())
    tls = ChannelTls(bench.authority.pem, ATTESTOR, gateway.identity())
    with open_channel(bench.attestor.server.further_address, tls=tls) as channel:
        stub = attestor_pb2_grpc.AttestorServiceStub(channel)
        assert stub.RenewCertificate(message, timeout=5).certificate
        bench.clock.now += ENROLLED_SECONDS + 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.RenewCertificate(message, timeout=5)
        assert isinstance(from_rpc_error(caught.value), AuthenticationError)


def test_attested_services_do_not_renew_without_attesting(tls_bench: TlsBench) -> None:
    workload = tls_bench.workload()
    identity, _ = certified(workload)
    assert workload.client.tls is not None
    message = pb.RenewCertificateRequest(certificate_request=workload.client.tls.request())
    with pytest.raises(PermissionDeniedError):
        tls_bench.call("RenewCertificate", message, identity)


def test_a_gateway_gets_no_keys(enrolment: Enrolment) -> None:
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    message = release_message(enrolment.bench, enrolment.bench.workload())
    with pytest.raises(PermissionDeniedError, match="gateway"):
        enrolment.bench.call("ReleaseKey", message, gateway.identity())


def test_kept_files_of_no_use(enrolment: Enrolment) -> None:
    gateway = enrolment.service(enrolment.secret())
    gateway.refresh()
    folder = enrolment.folder / "gateway"
    (folder / CERTIFICATE_FILE).write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="tensafe attestor enrol"):
        enrolment.service(None).refresh()
    assert enrolment.service(enrolment.secret()).refresh()
    (folder / KEY_FILE).chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        enrolment.service(None)
    (folder / KEY_FILE).chmod(0o600)
    (folder / KEY_FILE).write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="not the key"):
        enrolment.service(None)
    enrolment.authority.write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=r"authority\.pem.*tensafe attestor authority"):
        enrolment.service(None, "other")


def test_no_secret_is_recorded(enrolment: Enrolment) -> None:
    secret = enrolment.secret()
    text = secret.read_text().strip()
    enrolment.service(secret).refresh()
    log = b"".join(enrolment.bench.audit_lines)
    assert text.encode() not in log and b"PRIVATE" not in log


def test_the_attestor_makes_its_own_certificate_anew(tls_bench: TlsBench, clock: Clock) -> None:
    own = OwnCertificate(tls_bench.attestor.state.authorities, clock=clock)
    first = own.identity()
    assert own.identity() is first
    clock.now += 1800
    assert own.identity() is not first


def test_settings_take_a_second_address(tls_bench: TlsBench) -> None:
    settings = tls_bench.settings().model_copy(update={"mutual_listen": tls_bench.attestor.server.further_address})
    with pytest.raises(ConfigurationError, match="--mutual-listen"):
        build_attestor(settings)
