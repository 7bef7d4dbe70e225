"""What a verified attestation token says."""

from __future__ import annotations

from dataclasses import dataclass

from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.identity import PublicIdentity


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """What a verified token says. Accept it only from someone who signs with `identity`."""

    identity: PublicIdentity
    kind: EvidenceKind
    role: Role
    tenant: str
    package_id: str
    """Package the evidence was bound to, empty for an inference host."""
    policy_sha256: str
    token_id: str
    issued_at: int
    expires_at: int
    """Unix seconds."""
    attestor_thumbprint: str
    tls_key_sha256: str = ""
    gpu_ids: tuple[str, ...] = ()
    """Attested GPUs of an inference host (`GpuClaims.device_id`); empty where the policy does not ask for them."""

    @property
    def simulated(self) -> bool:
        """True when no hardware vouches for the workload."""
        return self.kind is EvidenceKind.SIMULATED
