"""Tokens that nobody issued, or not like this, get nothing from any method that takes one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import TenSafeError, TokenError, TokenExpiredError
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.release import release_transcript, renew_transcript, watch_transcript
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.leases import tokens_granted

from .conftest import Bench

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
    "an id that nobody issued": (lambda f: f.changed(jti="made-up-by-forger"), TokenError, "no record of this token"),
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
