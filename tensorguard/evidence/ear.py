"""Attestation results: EAR tokens (draft-ietf-rats-ear-04) as ES256 JWTs, at most five minutes long."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from tensorguard import __version__
from tensorguard.errors import PermissionDeniedError, TokenError, TokenExpiredError
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.ear_claims import PROFILE, EarClaims
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.keys import AttestorKey, KeySet
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.policy import MAX_TOKEN_LIFE_SECONDS, Policy
from tensorguard.evidence.result import AttestationResult

MAX_TOKEN_BYTES = 8192
LEEWAY_SECONDS = 5
_ALGORITHM = "ES256"
_HEADER = {"alg": _ALGORITHM, "typ": "JWT"}


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token and what the audit log says about it."""

    token: str
    token_id: str
    expires_at: int


def issue_token(
    key: AttestorKey,
    policy: Policy,
    claims: Claims,
    identity: PublicIdentity,
    *,
    tenant: str,
    role: Role,
    package_id: str = "",
    tls_key_sha256: str = "",
    nonce: bytes = b"",
    gpus: Sequence[GpuClaims] = (),
    now: float | None = None,
) -> IssuedToken:
    """Sign the result of a successful appraisal of `claims`, and of the host's `gpus`, under `policy`."""
    issued = int(time.time() if now is None else now)
    expires = issued + min(policy.token_life_seconds, MAX_TOKEN_LIFE_SECONDS)
    token_id = secrets.token_urlsafe(16)
    simulated = claims.kind is EvidenceKind.SIMULATED
    payload: dict[str, Any] = {
        "eat_profile": PROFILE,
        "iat": issued,
        "exp": expires,
        "jti": token_id,
        "eat_nonce": _base64url(nonce) if nonce else None,
        "ear_verifier_id": {"developer": "TenSafe", "build": f"tensafe {__version__}"},
        "submods": {
            "workload": {
                # AR4SI tiers. Software that vouches for itself is never "affirming"; what only hardware could
                # know about it is a claim that nobody made (0).
                "ear_status": "warning" if simulated else "affirming",
                "ear_trustworthiness_vector": {
                    "instance-identity": 2,
                    "executables": 0 if simulated else 2,
                    "hardware": 0 if simulated else 2,
                },
                "ear_appraisal_policy_ids": [f"{policy.id}#sha256:{policy.sha256}"],
            }
        },
        "cnf": {"jwk": identity.jwk},
        "tensafe": {
            "evidence_kind": claims.kind.value,
            "role": role.value,
            "tenant": tenant,
            "package_id": package_id,
            "policy_sha256": policy.sha256,
            "hpke_key": _base64url(identity.hpke_key),
            "tls_key_sha256": tls_key_sha256,
        },
    }
    if gpus:
        payload["submods"]["gpu"] = {
            # Authentic hardware and allowed versions. What the firmware measured is not compared: nobody's claim (0).
            "ear_status": "warning" if simulated else "affirming",
            "ear_trustworthiness_vector": {"instance-identity": 2, "executables": 0, "hardware": 2},
            "ear_appraisal_policy_ids": [f"{policy.id}#sha256:{policy.sha256}"],
            "tensafe_devices": [
                {
                    "device_id": gpu.device_id,
                    "model": gpu.model,
                    "driver_version": gpu.driver_version,
                    "vbios_version": gpu.vbios_version,
                }
                for gpu in gpus
            ],
        }
    payload = {name: value for name, value in payload.items() if value is not None}
    token = jwt.encode(payload, key.private_key, algorithm=_ALGORITHM, headers={"typ": "JWT", "kid": key.thumbprint})
    return IssuedToken(token, token_id, expires)


class TokenVerifier:
    """Verifies tokens of one attestor. Algorithm and key are the verifier's choice, not the token's."""

    def __init__(
        self, keys: KeySet, *, leeway_seconds: float = LEEWAY_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self._keys = keys
        self._leeway = leeway_seconds
        self._clock = clock

    def verify(
        self,
        token: str,
        *,
        role: Role | None = None,
        tenant: str | None = None,
        package_id: str | None = None,
    ) -> AttestationResult:
        """What the token says, for the role, tenant and package that the caller expects (None: any).

        Raises TokenExpiredError past its expiry, PermissionDeniedError when it is authentic but for another
        role, tenant or package, and TokenError for everything else.
        """
        key_id, key = self._key_of(token)
        try:
            # Time is checked below, by this verifier's clock.
            payload = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                options={
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_aud": False,
                    "verify_iss": False,
                    "verify_jti": False,
                    "verify_sub": False,
                },
            )
            claims = EarClaims.model_validate_json(json.dumps(payload))
        except jwt.InvalidSignatureError:
            raise TokenError("the token's signature does not verify with the attestor's key") from None
        except (jwt.PyJWTError, ValidationError, ValueError, RecursionError, TypeError):
            raise TokenError("the token is not an attestation result this version understands") from None
        self._check_time(claims)
        result = claims.to_result(key_id)
        for what, actual, expected in (
            ("role", result.role, role),
            ("tenant", result.tenant, tenant),
            ("package", result.package_id, package_id),
        ):
            if expected is not None and actual != expected:
                raise PermissionDeniedError(f"the token is for another {what}; attest for this one")
        return result

    def _key_of(self, token: str) -> tuple[str, ec.EllipticCurvePublicKey]:
        key_id = key_id_of(token)
        key = self._keys.get(key_id)
        if key is None:
            raise TokenError("the token is signed with a key that is not the expected attestor's")
        return key_id, key

    def _check_time(self, claims: EarClaims) -> None:
        now = self._clock()
        if claims.exp - claims.iat > MAX_TOKEN_LIFE_SECONDS or claims.exp <= claims.iat:
            raise TokenError(f"the token claims to live longer than {MAX_TOKEN_LIFE_SECONDS} seconds")
        if claims.iat > now + self._leeway:
            raise TokenError("the token is from the future; check both machines' clocks")
        if now >= claims.exp + self._leeway:
            raise TokenExpiredError(
                f"the token expired {now - claims.exp:.0f} s ago; attest again, and check both machines' clocks"
            )


def key_id_of(token: str) -> str:
    """The `kid` of a token whose header is as it has to be. Nothing is verified. Raises TokenError."""
    if not isinstance(token, str) or not token.isascii() or len(token) > MAX_TOKEN_BYTES:
        raise TokenError(f"the token is not ASCII text of at most {MAX_TOKEN_BYTES} bytes")
    if token.count(".") != 2:
        raise TokenError("the token is not a compact JWS")
    segments = token.split(".")
    try:
        parts = [base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) for text in segments]
        # One token, one spelling, whatever the JWT library's version lets pass.
        if [_base64url(part) for part in parts] != segments:
            raise TokenError("the token is not canonical base64url")
        header = json.loads(parts[0])
    except (ValueError, RecursionError):
        raise TokenError("the token's header is not JSON") from None
    key_id = header.pop("kid", None) if isinstance(header, dict) else None
    # Exactly our header: another alg, any crit extension, embedded keys and key URLs are all refused.
    if header != _HEADER or not isinstance(key_id, str):
        raise TokenError("the token's header must be alg ES256, typ JWT and a kid, and nothing else")
    return key_id


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
