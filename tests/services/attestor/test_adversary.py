"""Attacks on a running attestor over its whole protocol: each is refused for its own reason, and leaves nothing behind.

What concerns one step alone is beside that step: nonces and evidence in test_attest.py, stolen tokens, changed requests
and old sequences in test_release.py, single revocations in test_revocation.py, the token format in
tests/evidence/test_ear.py.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.attestor.server import build_attestor
from tensorguard.errors import (
    EvidenceRefusedError,
    InternalError,
    InvalidInputError,
    NonceError,
    RevokedError,
    TenSafeError,
    TokenError,
    TokenExpiredError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.release import release_transcript, renew_transcript, watch_transcript
from tensorguard.evidence.workload import Workload
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.audit_head import HeadKeeper, RollbackError
from tensorguard.store.backup import back_up, restore
from tensorguard.store.database import FILE_NAME
from tensorguard.store.leases import tokens_granted
from tensorguard.store.revocations import RevocationKind, Subject, revoke
from tensorguard.store.state import AttestorState, StateLocation

from .conftest import CODE, GRANT, LEASE_SECONDS, Bench
from .test_attest import attest, nonce_of, request

METHODS = ("ReleaseKey", "RenewLease", "WatchRevocations")
EVENTS = {"ReleaseKey": "release", "RenewLease": "renew"}


def ask(bench: Bench, method: str, token: str, identity: WorkloadIdentity, lease_id: str = "lease") -> Any:
    """A request in which everything is right but, perhaps, the token. Raises what the attestor answers."""
    thumbprint, nonce, release = bench.state.attestor_thumbprint, secrets.token_bytes(32), bench.release
    requests: dict[str, tuple[bytes, dict[str, Any]]] = {
        "ReleaseKey": (
            release_transcript(thumbprint, token, release, 1, nonce),
            {
                "manifest_digest": release.manifest_digest,
                "package_id": release.package_id,
                "sequence": release.sequence,
                "tokens_wanted": 1,
            },
        ),
        "RenewLease": (
            renew_transcript(thumbprint, token, lease_id, 0, 1, nonce),
            {"lease_id": lease_id, "tokens_used": 0, "tokens_wanted": 1},
        ),
        "WatchRevocations": (watch_transcript(thumbprint, token, 0, nonce), {"after": 0}),
    }
    signed, fields = requests[method]
    message = getattr(pb, f"{method}Request")(
        token=token, signature=identity.sign(signed), request_nonce=nonce, **fields
    )
    try:
        answer = getattr(bench.client()._stub, method)(message, timeout=5)
        return next(answer) if method == "WatchRevocations" else answer
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def decisions(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.audit_lines]


def granted(bench: Bench) -> int:
    with bench.attestor.state.database.reading() as connection:
        return tokens_granted(connection, bench.release)


# Tokens


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Forger:
    """Has a good token of the workload it attacks, everything public, and, for what only the attestor could do wrong,
    the attestor's key."""

    def __init__(self, bench: Bench, token: str) -> None:
        self.token = token
        self.header, self.body, self.signature = token.split(".")
        self.payload: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
        self.key = bench.attestor.state.key
        self.now = int(bench.clock())

    def headed(self, **header: object) -> dict[str, object]:
        return {"alg": "ES256", "typ": "JWT", "kid": self.key.thumbprint, **header}

    def signed(self, header: dict[str, object], payload: dict[str, Any], key: AttestorKey | None = None) -> str:
        """By the attestor itself, unless `key` is another one."""
        text = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}"
        algorithm = jwt.algorithms.ECAlgorithm(hash_alg=jwt.algorithms.ECAlgorithm.SHA256)
        return f"{text}.{b64(algorithm.sign(text.encode(), (key or self.key).private_key))}"

    def changed(self, **payload: Any) -> str:
        return self.signed(self.headed(), {**self.payload, **payload})

    def with_public_key_as_secret(self) -> str:
        public = self.key.private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        text = f"{b64(json.dumps(self.headed(alg='HS256')).encode())}.{self.body}"
        return f"{text}.{b64(hmac.new(public, text.encode(), hashlib.sha256).digest())}"

    def on_another_curve(self) -> str:
        other = ec.generate_private_key(ec.SECP384R1())
        return jwt.encode(self.payload, other, "ES384", headers={"typ": "JWT", "kid": self.key.thumbprint})

    def with_another_body(self) -> str:
        """The holder's own key in place of the workload's, under the signature of before."""
        body = {**self.payload, "cnf": {"jwk": WorkloadIdentity.generate().public.jwk}}
        return f"{self.header}.{b64(json.dumps(body).encode())}.{self.signature}"


FORGERIES: dict[str, tuple[Callable[[Forger], str], type[TenSafeError], str]] = {
    "alg none": (
        lambda f: f"{b64(json.dumps(f.headed(alg='none')).encode())}.{f.body}.",
        TokenError,
        "header must be alg ES256",
    ),
    "HS256 with the public key as secret": (Forger.with_public_key_as_secret, TokenError, "header must be alg ES256"),
    "another curve": (Forger.on_another_curve, TokenError, "header must be alg ES256"),
    "unknown crit": (
        lambda f: f.signed(f.headed(crit=["x-unknown"], **{"x-unknown": 1}), f.payload),
        TokenError,
        "header must be alg ES256",
    ),
    "a key of its own in the header": (
        lambda f: f.signed(f.headed(jwk={"kty": "EC"}), f.payload, AttestorKey.generate()),
        TokenError,
        "header must be alg ES256",
    ),
    "another attestor under our key id": (
        lambda f: f.signed(f.headed(), f.payload, AttestorKey.generate()),
        TokenError,
        "signature does not verify",
    ),
    "another attestor": (
        lambda f: (lambda key: f.signed(f.headed(kid=key.thumbprint), f.payload, key))(AttestorKey.generate()),
        TokenError,
        "not the expected attestor's",
    ),
    "another key in a signed token": (Forger.with_another_body, TokenError, "signature does not verify"),
    "no signature": (lambda f: f"{f.header}.{f.body}.", TokenError, "signature does not verify"),
    "deeply nested": (lambda _: f"{b64(b'[' * 5000)}.e30.e30", TokenError, "not JSON"),
    "oversize": (lambda _: "x" * 100_000, TokenError, "at most"),
    "expired": (lambda f: f.changed(iat=f.now - 400, exp=f.now - 100), TokenExpiredError, "attest again"),
    "from the future": (lambda f: f.changed(iat=f.now + 60, exp=f.now + 360), TokenError, "from the future"),
    "too long a life": (lambda f: f.changed(exp=f.now + 86_400), TokenError, "live longer"),
    "an id that nobody issued": (lambda f: f.changed(jti="made-up"), TokenError, "no record of this token"),
    "under another policy": (
        lambda f: f.changed(
            tensafe={**f.payload["tensafe"], "policy_sha256": "ab" * 32},
            submods={
                "workload": {
                    **f.payload["submods"]["workload"],
                    "ear_appraisal_policy_ids": ["development#sha256:" + "ab" * 32],
                }
            },
        ),
        TokenError,
        "policy has changed",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_token_gets_nothing(bench: Bench, name: str, method: str) -> None:
    forge, kind, message = FORGERIES[name]
    workload = bench.workload()
    forged = forge(Forger(bench, workload.token()))
    with pytest.raises(kind, match=message) as refused:
        ask(bench, method, forged, workload.identity)
    assert type(refused.value) is kind
    if method in EVENTS:
        last = decisions(bench)[-1]
        assert (last["event"], last["decision"], last["reason"]) == (EVENTS[method], "refused", kind.reason)
    assert granted(bench) == 0


def test_the_forger_can_sign_what_is_good(bench: Bench) -> None:
    """So what was refused above was refused for what was changed."""
    workload = bench.workload()
    forger = Forger(bench, workload.token())
    assert ask(bench, "ReleaseKey", forger.signed(forger.headed(), forger.payload), workload.identity).sealed_key
    assert granted(bench) == 1


# Sizes


@pytest.mark.parametrize("method", [*METHODS, "Attest"])
def test_more_than_a_message_may_have_is_not_read(bench: Bench, method: str) -> None:
    records = bench.attestor.state.audit.head.records
    message = getattr(pb, f"{method}Request")()
    setattr(message, "evidence" if method == "Attest" else "signature", bytes(300 * 1024))
    with pytest.raises(grpc.RpcError) as refused:
        answer = getattr(bench.client()._stub, method)(message, timeout=5)
        next(answer)
    error = from_rpc_error(refused.value)
    assert (type(error), error.reason) == (InvalidInputError, "invalid_input")
    assert bench.attestor.state.audit.head.records == records


def test_deeply_nested_evidence(bench: Bench) -> None:
    """Its signature is asked first; then nothing that deep is well-formed."""
    identity = WorkloadIdentity.generate()
    for evidence in (b"[" * 60_000, b'{"a":' * 12_000, b"\x9f" * 60_000):
        with pytest.raises(EvidenceRefusedError):
            attest(bench, request(bench, identity, nonce_of(bench), evidence=evidence))
        assert decisions(bench)[-1]["detail"] in ("signature", "malformed")


# Clocks


def at_skew(bench: Bench, seconds: float) -> Workload:
    """A workload whose clock differs from the attestor's."""
    workload = bench.workload()
    workload.client._clock = lambda: bench.clock() + seconds
    workload._platform._clock = workload.client._clock  # type: ignore[attr-defined]
    return workload


@pytest.mark.parametrize("seconds", [-4, 4])
def test_clocks_may_differ_by_seconds(bench: Bench, seconds: float) -> None:
    assert at_skew(bench, seconds).release_key(bench.release, tokens_wanted=1).terms.tokens_granted == 1


@pytest.mark.parametrize("seconds", [-400, 400])
def test_a_platform_whose_clock_is_wrong_is_told_so(bench: Bench, seconds: float) -> None:
    with pytest.raises(EvidenceRefusedError, match="check both machines' clocks"):
        at_skew(bench, seconds).token()
    assert decisions(bench)[-1]["detail"] == "evidence_time"


def test_a_workload_does_not_use_a_token_from_its_future(bench: Bench) -> None:
    with pytest.raises(TokenError, match="from the future; check both machines' clocks"):
        at_skew(bench, -30).token()


def test_a_clock_that_is_set_back_extends_nothing(bench: Bench) -> None:
    """A token is from the future then, and a renewed lease ends earlier than before."""
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=10).terms
    token, ended = workload.token(), lease.expires_at
    bench.clock.now -= 100
    for method in METHODS:
        with pytest.raises(TokenError, match="from the future"):
            ask(bench, method, token, workload.identity, lease.lease_id)
    again = bench.client().attest(
        workload.identity, bench.platform(), role=Role.COPROCESSOR, tenant="tenant", package_id="package"
    )
    renewed = ask(bench, "RenewLease", again, workload.identity, lease.lease_id)
    assert renewed.lease_expires_at == bench.clock() + LEASE_SECONDS < ended


# Races


def test_one_challenge_is_answered_once_however_many_try(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    message = request(bench, identity, nonce_of(bench))

    def outcome(_: int) -> str:
        try:
            return "token" if attest(bench, message) else ""
        except NonceError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(outcome, range(8))) == ["nonce"] * 7 + ["token"]


def test_a_double_release_through_two_attestors_is_one_lease(bench: Bench) -> None:
    workload = bench.workload()
    token = workload.token()
    second = build_attestor(bench.settings(), clock=bench.clock)
    second.server.start()
    clients = [
        AttestorClient(address, thumbprint=bench.state.attestor_thumbprint, clock=bench.clock)
        for address in (bench.attestor.server.address, second.server.address)
    ]

    def release(number: int) -> str:
        client = clients[number % 2]
        return client.release_key(workload.identity, token, bench.release, tokens_wanted=GRANT).terms.lease_id

    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(release, range(16)))) == 1
        assert granted(bench) == GRANT
    finally:
        for client in clients:
            client.close()
        second.server.stop(0)
        second.close()


# Restarts


def test_a_restart_between_any_two_steps_is_not_noticed(bench: Bench) -> None:
    identity = WorkloadIdentity.generate()
    message = request(bench, identity, nonce_of(bench))
    bench.restart()
    token = attest(bench, message)
    bench.restart()
    released = bench.client().release_key(identity, token, bench.release, tokens_wanted=10)
    bench.restart()
    again = bench.client().release_key(identity, token, bench.release, tokens_wanted=300)
    assert again.terms == released.terms
    bench.restart()
    renewed = bench.client().renew(identity, token, released.terms.lease_id, tokens_used=10, tokens_wanted=5)
    assert (renewed.tokens_granted, granted(bench)) == (15, 15)


def test_an_attestor_that_dies_before_its_answer_is_asked_again_and_charges_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = bench.workload()
    token = workload.token()

    def dies(self: HeadKeeper, *_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(HeadKeeper, "keep", dies)
    with pytest.raises(InternalError):
        workload.release_key(bench.release, tokens_wanted=100)
    monkeypatch.undo()
    bench.restart()
    released = bench.client().release_key(workload.identity, token, bench.release, tokens_wanted=100)
    assert (released.terms.tokens_granted, granted(bench)) == (100, 100)


# An old database


def test_a_database_from_an_old_backup_is_refused_and_its_lost_tokens_are_worth_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    backup = tmp_path / "backup.sqlite3"
    back_up(bench.attestor.state, backup)
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=GRANT).terms
    token = workload.token()
    bench.stop()
    for path in bench.state.state_dir.glob(f"{FILE_NAME}*"):
        path.unlink()
    restore(backup, bench.state.state_dir)
    with pytest.raises(RollbackError) as refused:
        build_attestor(bench.settings(), clock=bench.clock)
    assert refused.value.reason == "rollback"

    AttestorState(StateLocation(bench.state.state_dir), clock=bench.clock, accept_rollback="the disk was lost").close()
    bench.attestor = bench._start()
    for method in METHODS:
        with pytest.raises(TokenError, match="no record of this token"):
            ask(bench, method, token, workload.identity, lease.lease_id)
    assert [item["reason"] for item in decisions(bench)[-2:]] == ["token", "token"]


# Everything revoked


def test_with_everything_revoked_nothing_is_left_to_ask(bench: Bench) -> None:
    workload = bench.workload()
    lease = workload.release_key(bench.release, tokens_wanted=1).terms
    token = workload.token()
    package = bench.attestor.state.packages.lookup("tenant", "package", 1, bench.release.manifest_digest.hex())
    subjects = [
        Subject(RevocationKind.PACKAGE, "tenant", "package"),
        Subject(RevocationKind.VERSION, "tenant", "package", 1),
        Subject(RevocationKind.KEY, value=package.key_id),
        Subject(RevocationKind.WORKLOAD, value=workload.identity.public.thumbprint),
        Subject(RevocationKind.MEASUREMENT, value=CODE),
        Subject(RevocationKind.CHIP, value="ab" * 64),
    ]
    with bench.attestor.state.audit.recording("revoke", {}) as connection:
        for subject in subjects:
            revoke(connection, subject, "", int(bench.clock()))
    for method in METHODS:
        with pytest.raises(RevokedError):
            ask(bench, method, token, workload.identity, lease.lease_id)
    with pytest.raises(RevokedError):
        bench.workload().token()
    last = decisions(bench)[-3:]
    assert [(item["event"], item["reason"]) for item in last] == [
        ("release", "revoked"),
        ("renew", "revoked"),
        ("attest", "revoked"),
    ]
    assert {item["detail"] for item in last} <= {f"{kind.value}_revoked" for kind in RevocationKind}
