"""The claims set of our EAR tokens, strictly: draft-ietf-rats-ear-04 plus one private claim, `tensafe`."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tensorguard.errors import InvalidInputError, TokenError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.identity import PublicIdentity
from tensorguard.evidence.result import AttestationResult

PROFILE = "tag:ietf.org,2026:rats/ear#04"

_Base64Url = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]*$", max_length=4096)]
_Coordinate = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(max_length=64)]


class _Claims(BaseModel):
    # Claims that a newer attestor adds are no reason to refuse; those below must be there and be right.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Jwk(_Claims):
    kty: Literal["EC"]
    crv: Literal["P-256"]
    x: _Coordinate
    y: _Coordinate


class _Confirmation(_Claims):
    jwk: _Jwk


class _Appraisal(_Claims):
    ear_status: Literal["affirming", "warning"]


class _Device(_Claims):
    device_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}$")]


class _GpuAppraisal(_Appraisal):
    tensafe_devices: Annotated[list[_Device], Field(min_length=1)]


class _Submodules(_Claims):
    workload: _Appraisal
    gpu: _GpuAppraisal | None = None


class _TenSafe(_Claims):
    evidence_kind: Annotated[EvidenceKind, Field(strict=False)]
    role: Annotated[Role, Field(strict=False)]
    tenant: _Name
    package_id: _Name
    policy_sha256: _Sha256
    hpke_key: _Base64Url
    tls_key_sha256: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""


class EarClaims(_Claims):
    """The claims this version reads."""

    eat_profile: Literal["tag:ietf.org,2026:rats/ear#04"]
    iat: Annotated[int, Field(ge=0)]
    exp: Annotated[int, Field(ge=0)]
    jti: Annotated[str, StringConstraints(min_length=16, max_length=64)]
    submods: _Submodules
    cnf: _Confirmation
    tensafe: _TenSafe

    def to_result(self, attestor_thumbprint: str) -> AttestationResult:
        """The claims as an AttestationResult. Raises TokenError when keys or tier do not fit."""
        own = self.tensafe
        expected = "warning" if own.evidence_kind is EvidenceKind.SIMULATED else "affirming"
        if self.submods.workload.ear_status != expected:
            raise TokenError(f"evidence of kind {own.evidence_kind.value} cannot have this trust tier")
        try:
            identity = PublicIdentity(
                b"\x04" + _decode(self.cnf.jwk.x) + _decode(self.cnf.jwk.y), _decode(own.hpke_key)
            )
            identity.validate()
        except (InvalidInputError, binascii.Error, ValueError):
            raise TokenError("the keys in the token are malformed") from None
        return AttestationResult(
            identity=identity,
            kind=own.evidence_kind,
            role=own.role,
            tenant=own.tenant,
            package_id=own.package_id,
            policy_sha256=own.policy_sha256,
            token_id=self.jti,
            issued_at=self.iat,
            expires_at=self.exp,
            attestor_thumbprint=attestor_thumbprint,
            tls_key_sha256=own.tls_key_sha256,
            gpu_ids=tuple(device.device_id for device in self.submods.gpu.tensafe_devices) if self.submods.gpu else (),
        )


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
