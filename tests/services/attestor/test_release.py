"""Key release, leases and budgets, over gRPC, with attacks."""

from __future__ import annotations

import base64
import io
import json
import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
import structlog
import yaml
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from tensorguard.errors import (
    AuthenticationError,
    BudgetExhaustedError,
    EvidenceRefusedError,
    InternalError,
    InvalidInputError,
    LeaseExpiredError,
    NotFoundError,
    PermissionDeniedError,
    PolicyError,
    TenSafeError,
    TokenError,
    TokenExpiredError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import PublicIdentity, WorkloadIdentity
from tensorguard.evidence.policy import load_policy
from tensorguard.evidence.release import Release, release_transcript, renew_transcript
from tensorguard.evidence.workload import Workload
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.audit import AuditLog

from .conftest import BUDGET, CONTENT_KEY, GRANT, LEASE_SECONDS, Bench


def release_message(
    bench: Bench,
    workload: Workload,
    release: Release,
    *,
    signer: WorkloadIdentity | None = None,
    wanted: int = 10,
) -> pb.ReleaseKeyRequest:
    nonce, token = secrets.token_bytes(32), workload.token()
    signed = release_transcript(bench.state.attestor_thumbprint, token, release, wanted, nonce)
    return pb.ReleaseKeyRequest(
        token=token,
        manifest_digest=release.manifest_digest,
        package_id=release.package_id,
        sequence=release.sequence,
        tokens_wanted=wanted,
        signature=(signer or workload.identity).sign(signed),
        request_nonce=nonce,
    )


def send(workload: Workload, method: str, message: Any) -> Any:
    try:
        return getattr(workload.client._stub, method)(message, timeout=5)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def test_release_and_renew(bench: Bench) -> None:
    workload = bench.workload()
    released = workload.release_key(bench.release, tokens_wanted=100)
    assert released.content_key == CONTENT_KEY
    assert released.terms.tokens_granted == 100
    assert released.terms.expires_at == bench.clock() + LEASE_SECONDS
    bench.clock.now += 100
    renewed = workload.renew(released.terms.lease_id, tokens_used=100, tokens_wanted=50)
    assert renewed.tokens_granted == 150
    assert renewed.expires_at == bench.clock() + LEASE_SECONDS
    assert len(bench.audit_lines) == workload.client.status().audit_records


def test_grants_come_in_chunks(bench: Bench) -> None:
    released = bench.workload().release_key(bench.release, tokens_wanted=10**6)
    assert released.terms.tokens_granted == GRANT


def test_stolen_token_with_another_key(bench: Bench) -> None:
    workload = bench.workload()
    thief = WorkloadIdentity.generate()
    with pytest.raises(AuthenticationError):
        send(workload, "ReleaseKey", release_message(bench, workload, bench.release, signer=thief))
    with pytest.raises(AuthenticationError):
        workload.client.release_key(thief, workload.token(), bench.release, tokens_wanted=1)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_wanted": 11},
        {"sequence": 2},
        {"manifest_digest": b"\x00" * 32},
        {"package_id": "another"},
        {"request_nonce": b"\x00" * 32},
        {"signature": b""},
        {"signature": b"\x30" * 72},
    ],
)
def test_every_field_is_signed(bench: Bench, change: dict[str, Any]) -> None:
    workload = bench.workload()
    message = release_message(bench, workload, bench.release)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(AuthenticationError):
        send(workload, "ReleaseKey", message)


class OldPeer:
    """A workload without ML-KEM: its own keys, and nothing of ours but the bytes that are signed."""

    def __init__(self) -> None:
        self.signing = ec.generate_private_key(ec.SECP256R1())
        self.recipient = x25519.X25519PrivateKey.generate()
        point = self.signing.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        self.public = PublicIdentity(point, self.recipient.public_key().public_bytes_raw())

    def sign(self, transcript: bytes) -> bytes:
        return self.signing.sign(transcript, ec.ECDSA(hashes.SHA256()))

    def open(self, sealed: bytes, info: bytes) -> bytes:
        suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        return suite.decrypt(sealed, self.recipient, info)


def allow_x25519(bench: Bench) -> None:
    document = yaml.safe_load(bench.state.policy_file.read_text())
    document["allow_x25519"] = True
    bench.state.policy_file.write_text(yaml.safe_dump(document))
    bench.restart()


def test_a_peer_without_ml_kem_gets_a_key_only_if_the_policy_says_so(bench: Bench) -> None:
    peer: Any = OldPeer()
    with pytest.raises(EvidenceRefusedError, match="set allow_x25519 in the policy"):
        bench.workload(identity=peer).token()
    assert json.loads(bench.audit_lines[-1])["detail"] == "hpke_suite_not_allowed"
    allow_x25519(bench)
    assert bench.workload(identity=peer).release_key(bench.release, tokens_wanted=1).content_key == CONTENT_KEY
    assert json.loads(bench.audit_lines[-1])["hpke_suite"] == "X25519"
    bench.workload().release_key(bench.release, tokens_wanted=1)
    assert json.loads(bench.audit_lines[-1])["hpke_suite"] == "MLKEM768-X25519"


def test_nobody_in_between_takes_ml_kem_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where X25519 is allowed: the evidence is over the key that was sent, and over no part of it."""
    allow_x25519(bench)
    workload = bench.workload()
    real = workload.client._stub.Attest

    def downgraded(message: Any, timeout: float) -> Any:
        message.hpke_key = message.hpke_key[1184:]
        return real(message, timeout=timeout)

    monkeypatch.setattr(workload.client._stub, "Attest", downgraded)
    with pytest.raises(EvidenceRefusedError):
        workload.token()
    assert json.loads(bench.audit_lines[-1])["detail"] == "report_data_mismatch"


def test_answers_are_bound_to_the_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A man in the middle changes the terms, or replays an answer: the sealed key does not open."""
    workload = bench.workload()
    real = workload.client._stub.ReleaseKey
    first = send(workload, "ReleaseKey", release_message(bench, workload, bench.release))

    def changed(**fields: Any) -> Any:
        def call(message: Any, timeout: float) -> Any:
            answer = real(message, timeout=timeout)
            for name, value in fields.items():
                setattr(answer, name, value)
            return answer

        return call

    for call in (
        changed(tokens_granted=10**9),
        changed(lease_expires_at=2**40),
        changed(lease_id="another"),
        changed(sealed_key=first.sealed_key),
        lambda message, timeout: first,
    ):
        monkeypatch.setattr(workload.client._stub, "ReleaseKey", call)
        with pytest.raises(AuthenticationError):
            workload.release_key(bench.release, tokens_wanted=10)


def test_wrong_release(bench: Bench) -> None:
    workload = bench.workload()
    with pytest.raises(NotFoundError):
        workload.release_key(replace(bench.release, sequence=2), tokens_wanted=1)
    with pytest.raises(NotFoundError):
        workload.release_key(replace(bench.release, manifest_digest=b"\x00" * 32), tokens_wanted=1)
    other = bench.register("other-package", 1)
    with pytest.raises(PermissionDeniedError):
        workload.release_key(other, tokens_wanted=1)


def test_wrong_tenant(bench: Bench) -> None:
    stranger = bench.workload(tenant="other-tenant")
    with pytest.raises(AuthenticationError):  # signs a transcript with the other tenant's name
        stranger.release_key(bench.release, tokens_wanted=1)
    with pytest.raises(NotFoundError):  # its own tenant has no such package
        stranger.release_key(replace(bench.release, tenant="other-tenant"), tokens_wanted=1)


def test_inference_host_gets_no_key(bench: Bench) -> None:
    with pytest.raises(PermissionDeniedError):
        bench.workload(role=Role.INFERENCE).release_key(bench.release, tokens_wanted=1)


def test_token_without_a_package_gets_no_key(bench: Bench) -> None:
    with pytest.raises(PermissionDeniedError):
        bench.workload(package_id="").release_key(bench.release, tokens_wanted=1)


def test_old_sequence(bench: Bench) -> None:
    bench.register("package", 2)
    with pytest.raises(PermissionDeniedError, match="replaced"):
        bench.workload().release_key(bench.release, tokens_wanted=1)


def test_expired_package(bench: Bench) -> None:
    bench.clock.now += 4900
    released = bench.workload().release_key(bench.release, tokens_wanted=1)
    assert released.terms.expires_at == bench.clock() + 100, "no lease outlives its package"
    bench.clock.now += 100
    with pytest.raises(LeaseExpiredError):
        bench.workload().release_key(bench.release, tokens_wanted=1)


def test_expired_token(bench: Bench) -> None:
    workload = bench.workload()
    message = release_message(bench, workload, bench.release)
    bench.clock.now += 305
    with pytest.raises(TokenExpiredError):
        send(workload, "ReleaseKey", message)


def test_token_of_an_earlier_policy(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    token = bench.workload(identity=identity).token()
    document = yaml.safe_load(bench.state.policy_file.read_text())
    document["lease"]["seconds"] = 10
    bench.state.policy_file.write_text(yaml.safe_dump(document))
    bench.restart()
    with pytest.raises(TokenError, match="policy"):
        bench.client().release_key(identity, token, bench.release, tokens_wanted=1)


def test_a_packages_release_policy_holds_for_release_and_renewal(bench: Bench) -> None:
    policy = load_policy(bench.state.policy_file)
    with pytest.raises(PolicyError, match="pack the adapter again"):
        bench.workload(package_id="strict").release_key(
            bench.register("strict", 1, release_policy_sha256="ab" * 32), tokens_wanted=1
        )
    release = bench.register("bound", 1, release_policy_sha256=policy.sha256)
    workload = bench.workload(package_id="bound")
    lease_id = workload.release_key(release, tokens_wanted=10).terms.lease_id
    workload.renew(lease_id, tokens_used=1, tokens_wanted=1)
    document = yaml.safe_load(bench.state.policy_file.read_text())
    document["lease"]["seconds"] = 10
    bench.state.policy_file.write_text(yaml.safe_dump(document))
    bench.restart()
    again = bench.workload(package_id="bound", identity=workload.identity)
    with pytest.raises(PolicyError, match="pack the adapter again"):
        again.renew(lease_id, tokens_used=1, tokens_wanted=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_wanted", 0),
        ("tokens_wanted", 2**63),
        ("sequence", 0),
        ("sequence", 2**63),
        ("manifest_digest", b""),
        ("manifest_digest", b"x" * 100_000),
        ("request_nonce", b""),
        ("package_id", "../x"),
    ],
)
def test_malformed(bench: Bench, field: str, value: Any) -> None:
    workload = bench.workload()
    message = release_message(bench, workload, bench.release)
    setattr(message, field, value)
    signed = Release("tenant", message.package_id, message.sequence, message.manifest_digest)
    message.signature = workload.identity.sign(
        release_transcript(
            bench.state.attestor_thumbprint,
            message.token,
            signed,
            message.tokens_wanted,
            message.request_nonce,
        )
    )
    with pytest.raises(InvalidInputError):
        send(workload, "ReleaseKey", message)


def test_garbage_token(bench: Bench) -> None:
    workload = bench.workload()
    message = release_message(bench, workload, bench.release)
    message.token = "x" * 20_000
    with pytest.raises(TokenError):
        send(workload, "ReleaseKey", message)


def test_releasing_again_is_the_same_lease(bench: Bench) -> None:
    workload = bench.workload()
    first = workload.release_key(bench.release, tokens_wanted=100)
    again = workload.release_key(bench.release, tokens_wanted=300)
    assert again.terms == first.terms
    message = release_message(bench, workload, bench.release)
    assert {send(workload, "ReleaseKey", message).lease_id for _ in range(3)} == {first.terms.lease_id}


def test_concurrent_releases_under_one_token_are_one_lease(bench: Bench) -> None:
    workload = bench.workload()
    workload.token()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: workload.release_key(bench.release, tokens_wanted=100).terms, range(8)))
    assert len(set(answers)) == 1


def test_budget_is_per_release_over_all_leases_and_restarts(bench: Bench) -> None:
    granted = [bench.workload().release_key(bench.release, tokens_wanted=GRANT).terms.tokens_granted]
    bench.restart()
    granted += [bench.workload().release_key(bench.release, tokens_wanted=GRANT).terms.tokens_granted for _ in range(2)]
    assert granted == [GRANT, GRANT, BUDGET - 2 * GRANT]
    with pytest.raises(BudgetExhaustedError):
        bench.workload().release_key(bench.release, tokens_wanted=1)
    another = bench.register("package", 2)
    assert bench.workload().release_key(another, tokens_wanted=1).terms.tokens_granted == 1


def test_budget_under_concurrency(bench: Bench) -> None:
    workloads = [bench.workload() for _ in range(6)]
    for workload in workloads:
        workload.token()

    def grant(workload: Workload) -> int:
        try:
            return workload.release_key(bench.release, tokens_wanted=GRANT).terms.tokens_granted
        except BudgetExhaustedError:
            return 0

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(grant, workloads)) == BUDGET


def test_renewals_spend_the_budget(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=GRANT).terms
    assert workload.renew(lease.lease_id, tokens_used=10, tokens_wanted=GRANT).tokens_granted == 2 * GRANT
    assert workload.renew(lease.lease_id, tokens_used=20, tokens_wanted=GRANT).tokens_granted == BUDGET
    # Nothing is left to grant, but what was granted is not used up.
    assert workload.renew(lease.lease_id, tokens_used=30, tokens_wanted=1).tokens_granted == BUDGET
    with pytest.raises(BudgetExhaustedError):
        workload.renew(lease.lease_id, tokens_used=BUDGET, tokens_wanted=1)


def test_counts_that_cannot_be(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=100).terms
    workload.renew(lease.lease_id, tokens_used=50, tokens_wanted=0)
    for used in (49, 101):
        with pytest.raises(InvalidInputError):
            workload.renew(lease.lease_id, tokens_used=used, tokens_wanted=1)


def test_lease_expiry(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=10).terms
    bench.clock.now += LEASE_SECONDS - 1
    workload.renew(lease.lease_id, tokens_used=0, tokens_wanted=1)
    bench.clock.now += LEASE_SECONDS
    with pytest.raises(LeaseExpiredError):
        workload.renew(lease.lease_id, tokens_used=0, tokens_wanted=1)


def test_lease_survives_a_restart(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    lease = bench.workload(identity=identity).release_key(bench.release, tokens_wanted=10).terms
    bench.restart()
    renewed = bench.workload(identity=identity).renew(lease.lease_id, tokens_used=10, tokens_wanted=10)
    assert renewed.tokens_granted == 20


def test_a_lease_is_its_holders(bench: Bench) -> None:
    lease = bench.workload().release_key(bench.release, tokens_wanted=10).terms
    bench.register("package", 1, tenant="other-tenant")
    for other in (bench.workload(), bench.workload(tenant="other-tenant")):
        with pytest.raises(PermissionDeniedError):
            other.renew(lease.lease_id, tokens_used=0, tokens_wanted=1)
    with pytest.raises(NotFoundError):
        bench.workload().renew("no-such-lease", tokens_used=0, tokens_wanted=1)


def test_replayed_renewal_changes_nothing(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=10).terms
    nonce, token = secrets.token_bytes(32), workload.token()
    signed = renew_transcript(bench.state.attestor_thumbprint, token, lease.lease_id, 5, 100, nonce)
    message = pb.RenewLeaseRequest(
        token=token,
        lease_id=lease.lease_id,
        tokens_used=5,
        tokens_wanted=100,
        signature=workload.identity.sign(signed),
        request_nonce=nonce,
    )
    first = send(workload, "RenewLease", message)
    bench.clock.now += 10
    assert first == send(workload, "RenewLease", message)
    assert first.tokens_granted == 110
    message.tokens_wanted = 200
    with pytest.raises(AuthenticationError):
        send(workload, "RenewLease", message)


def test_no_key_without_an_audit_record(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = bench.workload()
    workload.token()

    def broken(self: AuditLog, connection: object, event: str, fields: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(AuditLog, "_append", broken)
    with pytest.raises(InternalError):
        workload.release_key(bench.release, tokens_wanted=10)
    monkeypatch.undo()
    # The caller asks again and is charged once.
    assert workload.release_key(bench.release, tokens_wanted=10).terms.tokens_granted == 10


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    stream, handlers, level = io.StringIO(), logging.root.handlers[:], logging.root.level
    configure_logging("test", level="debug", stream=stream)
    yield stream
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_neither_logs_nor_audit_nor_errors_hold_secrets(bench: Bench, log_text: io.StringIO) -> None:
    workload = bench.workload()
    messages: list[str] = []
    released = workload.release_key(bench.release, tokens_wanted=10)
    workload.renew(released.terms.lease_id, tokens_used=1, tokens_wanted=1)
    for attempt in (
        lambda: workload.release_key(replace(bench.release, sequence=9), tokens_wanted=1),
        lambda: workload.client.release_key(
            WorkloadIdentity.generate(), workload.token(), bench.release, tokens_wanted=1
        ),
        lambda: workload.renew("unknown", tokens_used=1, tokens_wanted=1),
    ):
        with pytest.raises(TenSafeError) as error:
            attempt()
        messages.append(str(error.value))
    text = "\n".join([log_text.getvalue(), b"".join(bench.audit_lines).decode(), *messages, repr(released)])
    assert "decided" in text
    secret_texts = [workload.token(), workload.token().split(".")[2], CONTENT_KEY.hex(), repr(CONTENT_KEY)]
    secret_texts += [base64.b64encode(CONTENT_KEY).decode(), "PRIVATE KEY"]
    for secret in secret_texts:
        assert secret not in text
    assert all(json.loads(line) for line in bench.audit_lines)
