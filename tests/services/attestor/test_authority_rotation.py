"""Rotation of the authority while services run, over TLS. TLS has the machine's clock, so steps are of seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tensorguard.errors import AuthenticationError, UnavailableError
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.enrolment import EnrolledService
from tensorguard.evidence.tls import ATTESTOR, CertifiedKey
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity
from tensorguard.store.signing_keys import LOOK_SECONDS

from .conftest import CONTENT_KEY, Clock
from .test_certificates import GATEWAY, TlsBench, release_message

OVERLAP = RETIRE = 15


class Site:
    """An attestor, the authority's file as its services have it, and services."""

    def __init__(self, bench: TlsBench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.old = bench.authority
        self.file = folder / "authority.pem"
        self.hand_out()

    def hand_out(self) -> None:
        """What an operator does with `tensafe attestor authority`."""
        self.file.write_bytes(self.bench.attestor.state.authorities.pem)

    def announce(self) -> None:
        self.bench.attestor.state.rotate_authority(OVERLAP, RETIRE)
        self.bench.clock.now += LOOK_SECONDS

    def workload(self) -> Workload:
        made = self.bench.workload()
        tls = CertifiedKey(self.file.read_bytes(), clock=self.bench.clock, authority_file=self.file)
        made.client = AttestorClient(self.bench.attestor.server.address, tls=tls, clock=self.bench.clock)
        self.bench._clients.append(made.client)
        return made

    def gateway(self) -> EnrolledService:
        secret = self.folder / "secret"
        secret.write_text(self.bench.attestor.state.enrol(GATEWAY, 60))
        secret.chmod(0o600)
        made = EnrolledService(GATEWAY, self.bench.attestor.server.address, self.file, self.folder / "tls", secret)
        made.refresh()
        return made


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Site]:
    bench = TlsBench(tmp_path, clock)
    yield Site(bench, tmp_path)
    bench.stop()


def identity_of(workload: Workload) -> TlsIdentity:
    workload.token()
    assert workload.client.tls is not None
    return workload.client.tls.identity()


def issuer_of(identity: TlsIdentity) -> x509.Name:
    return x509.load_pem_x509_certificate(identity.certificate).issuer


def attest_again(workload: Workload) -> None:
    workload._expires_at = 0
    workload.token()


def test_services_go_on_through_a_rotation(site: Site, clock: Clock) -> None:
    bench, workload, gateway = site.bench, site.workload(), site.gateway()
    assert workload.release_key(bench.release, tokens_wanted=1).content_key == CONTENT_KEY
    before = identity_of(workload)
    site.announce()
    site.hand_out()
    attest_again(workload)
    assert gateway.refresh(), "the file is new, so connections have to be"
    assert issuer_of(identity_of(workload)) == issuer_of(before) == site.old.certificate.subject
    clock.now += OVERLAP
    new = bench.authority.certificate.subject
    assert new != site.old.certificate.subject
    assert bench.call("ReleaseKey", release_message(bench, workload), before).sealed_key, "until it renews"
    assert workload.release_key(bench.release, tokens_wanted=1).content_key == CONTENT_KEY
    attest_again(workload)
    gateway._renew_at = 0.0
    assert gateway.refresh()
    assert issuer_of(identity_of(workload)) == issuer_of(gateway.identity()) == new
    clock.now += RETIRE
    with pytest.raises(UnavailableError):
        bench.call("ReleaseKey", release_message(bench, workload), before)
    assert bench.call("ReleaseKey", release_message(bench, workload), identity_of(workload)).sealed_key
    site.hand_out()
    attest_again(workload)
    assert identity_of(workload).authority == bench.authority.pem
    assert workload.release_key(bench.release, tokens_wanted=1).content_key == CONTENT_KEY
    gateway._renew_at = 0.0
    assert gateway.refresh()


def test_who_was_not_told_stops_and_goes_on_once_told(site: Site, clock: Clock) -> None:
    workload = site.workload()
    attest_again(workload)
    site.announce()
    clock.now += OVERLAP
    late = site.workload()
    with pytest.raises(UnavailableError):
        late.token()
    site.hand_out()
    assert late.token(), "over a channel that knows the new one"
    attest_again(workload)
    assert workload.release_key(site.bench.release, tokens_wanted=1).content_key == CONTENT_KEY


def test_a_channel_for_certified_callers_is_made_anew_for_another_authority(site: Site) -> None:
    workload = site.workload()
    workload.token()
    mutual, tls = workload.client._mutual, workload.client.tls
    assert mutual is not None and tls is not None
    first = mutual.channel()
    assert mutual.channel() is first
    site.announce()
    site.hand_out()
    assert tls.reload()
    second = mutual.channel()
    assert second is not first and mutual.channel() is second


def test_a_certificate_of_a_retired_authority_renews_nothing_over_an_old_connection(site: Site, clock: Clock) -> None:
    gateway = site.gateway()
    message = pb.RenewCertificateRequest(certificate_request=gateway.tls.request())
    tls = ChannelTls(site.old.pem, ATTESTOR, gateway.identity())
    with open_channel(site.bench.attestor.server.further_address, tls=tls) as channel:
        stub = attestor_pb2_grpc.AttestorServiceStub(channel)
        assert stub.RenewCertificate(message, timeout=5).certificate
        site.announce()
        clock.now += OVERLAP
        assert stub.RenewCertificate(message, timeout=5).certificate
        clock.now += RETIRE
        with pytest.raises(grpc.RpcError) as caught:
            stub.RenewCertificate(message, timeout=5)
        assert isinstance(from_rpc_error(caught.value), AuthenticationError)


def test_a_service_takes_certificates_of_all_that_its_file_names_and_of_no_other(site: Site, clock: Clock) -> None:
    key = CertifiedKey.read(site.file)
    site.announce()
    clock.now += OVERLAP
    other = CertifiedKey.read(site.file)
    issued = site.bench.authority.issue(
        x509.load_der_x509_csr(other.request()).public_key(),  # type: ignore[arg-type]
        GATEWAY,
        now=clock.now - OVERLAP,
        life_seconds=300,
    )
    with pytest.raises(AuthenticationError, match="authority"):
        other.accept(issued.public_bytes(Encoding.DER), GATEWAY, 1)
    assert not other.reload()
    site.hand_out()
    assert other.reload() and not other.reload()
    other.accept(issued.public_bytes(Encoding.DER), GATEWAY, 1)
    assert other.identity().authority == site.file.read_bytes()
    site.file.write_bytes(site.old.pem)
    assert other.reload()
    assert other.identity().authority == site.old.pem, "who is shown the certificate is known by the file"
    for useless in (b"", b"x", site.old.pem[:-30]):
        site.file.write_bytes(useless)
        assert not key.reload()
    site.file.unlink()
    assert not key.reload()
    assert key.authority == site.old.pem
