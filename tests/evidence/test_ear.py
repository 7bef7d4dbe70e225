from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import PermissionDeniedError, TokenError, TokenExpiredError
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.ear import TokenVerifier, issue_token
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.policy import parse_policy

KEY = AttestorKey.generate()
IDENTITY = WorkloadIdentity.generate()
NOW = 1_000_000
POLICY = parse_policy(
    json.dumps(
        {
            "version": 1,
            "id": "test",
            "evidence_kinds": ["simulated"],
            "tenants": ["tenant"],
            "roles": {"coprocessor": {"measurements": [{"evidence_kind": "simulated", "values": {"code": "ab" * 48}}]}},
            "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        }
    )
)


def token(key: AttestorKey = KEY, kind: EvidenceKind = EvidenceKind.SIMULATED) -> str:
    claims = Claims(kind, {"code": "ab" * 48}, b"d" * 64, NOW, False, Role.COPROCESSOR)
    return issue_token(
        key,
        POLICY,
        claims,
        IDENTITY.public,
        tenant="tenant",
        role=Role.COPROCESSOR,
        package_id="package",
        nonce=b"n" * 32,
        now=NOW,
    ).token


def verifier(now: float = NOW, key: AttestorKey = KEY) -> TokenVerifier:
    return TokenVerifier(key.key_set(), clock=lambda: now)


def payload_of(text: str) -> dict[str, Any]:
    return jwt.decode(text, options={"verify_signature": False})


def signed(payload: dict[str, Any], key: AttestorKey = KEY, **headers: object) -> str:
    header = {"typ": "JWT", "kid": key.thumbprint, **headers}
    return jwt.encode(payload, key.private_key, "ES256", headers=header)


def test_a_token_says_what_was_appraised() -> None:
    result = verifier().verify(token(), role=Role.COPROCESSOR, tenant="tenant", package_id="package")
    assert result.identity == IDENTITY.public
    assert result.kind is EvidenceKind.SIMULATED
    assert result.simulated
    assert result.policy_sha256 == POLICY.sha256
    assert result.expires_at == NOW + 300
    assert result.attestor_thumbprint == KEY.thumbprint


def test_claim_names_are_those_of_the_draft() -> None:
    payload = payload_of(token())
    assert payload["eat_profile"] == "tag:ietf.org,2026:rats/ear#04"
    assert {"iat", "exp", "jti", "eat_nonce", "ear_verifier_id", "submods", "cnf"} <= payload.keys()
    assert set(payload["ear_verifier_id"]) == {"developer", "build"}
    appraisal = payload["submods"]["workload"]
    assert appraisal["ear_status"] == "warning", "simulated evidence must never read as affirming"
    assert appraisal["ear_trustworthiness_vector"]["hardware"] == 0
    assert appraisal["ear_appraisal_policy_ids"] == [f"test#sha256:{POLICY.sha256}"]
    assert payload["cnf"]["jwk"] == IDENTITY.public.jwk


def test_token_ids_are_unique() -> None:
    assert payload_of(token())["jti"] != payload_of(token())["jti"]


def test_expiry() -> None:
    text = token()
    verifier(NOW + 304).verify(text)
    with pytest.raises(TokenExpiredError):
        verifier(NOW + 305).verify(text)


def test_from_the_future() -> None:
    with pytest.raises(TokenError, match="future"):
        verifier(NOW - 6).verify(token())


@pytest.mark.parametrize("expected", [{"role": Role.INFERENCE}, {"tenant": "other"}, {"package_id": "other"}])
def test_for_another_purpose(expected: dict[str, Any]) -> None:
    with pytest.raises(PermissionDeniedError):
        verifier().verify(token(), **expected)


def test_another_attestor() -> None:
    with pytest.raises(TokenError):
        verifier(key=AttestorKey.generate()).verify(token())
    # its signature under our kid
    forger = AttestorKey.generate()
    forged = jwt.encode(payload_of(token()), forger.private_key, "ES256", headers={"typ": "JWT", "kid": KEY.thumbprint})
    with pytest.raises(TokenError, match="signature"):
        verifier().verify(forged)


def test_no_character_can_be_changed() -> None:
    text = token()
    for position in range(0, len(text), 11):
        for replacement in ("A", "_", "\n", "."):
            mutated = text[:position] + replacement + text[position + 1 :]
            if mutated != text:
                with pytest.raises(TokenError):
                    verifier().verify(mutated)
    for mutated in (text + "=", text + "\n", " " + text, text[:-1] + chr(ord(text[-1]) ^ 1)):
        with pytest.raises(TokenError):
            verifier().verify(mutated)


def test_one_token_has_one_spelling() -> None:
    """The last character of each segment carries unused bits: other values decode to the same bytes."""
    segments = token().split(".")
    for index, segment in enumerate(segments):
        for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_":
            if last != segment[-1]:
                mutated = [*segments[:index], segment[:-1] + last, *segments[index + 1 :]]
                with pytest.raises(TokenError):
                    verifier().verify(".".join(mutated))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_algorithm_none() -> None:
    body = token().split(".")[1]
    for header in ({"alg": "none", "typ": "JWT"}, {"alg": "none", "typ": "JWT", "kid": KEY.thumbprint}):
        with pytest.raises(TokenError):
            verifier().verify(f"{b64(json.dumps(header).encode())}.{body}.")


def test_algorithm_confusion() -> None:
    body = token().split(".")[1]
    public = KEY.private_key.public_key()
    secrets = [
        public.public_bytes(encoding, form)
        for encoding, form in (
            (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
            (serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
        )
    ]
    for secret in [*secrets, KEY.thumbprint.encode(), b""]:
        for algorithm in ("HS256", "ES256"):
            header = b64(json.dumps({"alg": algorithm, "typ": "JWT", "kid": KEY.thumbprint}).encode())
            mac = hmac.new(secret, f"{header}.{body}".encode(), hashlib.sha256).digest()
            with pytest.raises(TokenError):
                verifier().verify(f"{header}.{body}.{b64(mac)}")


@pytest.mark.parametrize(
    "headers",
    [
        {"crit": ["exp"], "exp": 1},
        {"crit": []},
        {"jku": "https://attacker.example/keys"},
        {"jwk": {"kty": "EC"}},
        {"typ": "at+jwt"},
        {"kid": None},
        {"b64": False, "crit": ["b64"]},
    ],
)
def test_headers_that_we_do_not_write(headers: dict[str, object]) -> None:
    header = {"alg": "ES256", "typ": "JWT", "kid": KEY.thumbprint, **headers}
    head = b64(json.dumps(header).encode())
    body = token().split(".")[1]
    signature = jwt.algorithms.ECAlgorithm(hash_alg=jwt.algorithms.ECAlgorithm.SHA256).sign(
        f"{head}.{body}".encode(), KEY.private_key
    )
    with pytest.raises(TokenError):
        verifier().verify(f"{head}.{body}.{b64(signature)}")


@pytest.mark.parametrize(
    "change",
    [
        {"exp": NOW + 301},
        {"exp": NOW},
        {"exp": None},
        {"iat": "now"},
        {"jti": ""},
        {"eat_profile": "tag:ietf.org,2026:rats/ear#03"},
        {"submods": {}},
        {"submods": {"workload": {"ear_status": "contraindicated"}}},
        {"submods": {"workload": {"ear_status": "affirming"}}},  # for simulated evidence
        {"cnf": {}},
        {"cnf": {"jwk": {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "A" * 43}}},
        {"tensafe": {}},
    ],
)
def test_signed_but_wrong_claims(change: dict[str, Any]) -> None:
    with pytest.raises(TokenError):
        verifier().verify(signed({**payload_of(token()), **change}))


def test_unknown_claims_are_for_later_versions() -> None:
    verifier().verify(signed({**payload_of(token()), "new": 1}))


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a.b.c", "x" * 9000, "é.é.é", "." * 100, b64(b"[" * 5000) + ".e30.e30"]
)
def test_garbage(text: str) -> None:
    with pytest.raises(TokenError):
        verifier().verify(text)


def test_another_curve_is_no_key() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    text = jwt.encode(payload_of(token()), other, "ES384", headers={"typ": "JWT", "kid": KEY.thumbprint})
    with pytest.raises(TokenError):
        verifier().verify(text)
