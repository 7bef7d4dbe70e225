"""Conditions on the GPUs of a host: one small check each, composed from a role's section."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.nvidia.policy import GpuPolicy
from tensorguard.evidence.nvidia.verifier import GpuVerifier


class GpuCheck(Protocol):
    """One condition on all GPUs."""

    def verify(self, gpus: Sequence[GpuClaims]) -> None:
        """Raises EvidenceRefusedError, with `detail` for programs, when the condition does not hold."""


def gpu_checks(policy: GpuPolicy, nonce: bytes) -> list[GpuCheck]:
    """`nonce`: what the GPUs had to be challenged with (`report_data.gpu_nonce`)."""
    checks: list[GpuCheck] = [
        ExpectedGpuNonce(nonce),
        GpuCount(policy.count),
        AllowedGpus("model", policy.models, "models"),
        AllowedGpus("driver_version", policy.driver_versions, "driver_versions"),
        AllowedGpus("vbios_version", policy.vbios_versions, "vbios_versions"),
    ]
    if policy.devices != "any":
        checks.append(AllowedGpus("device_id", policy.devices, "devices"))
    return checks


def appraise_gpus(
    policy: GpuPolicy, evidence: bytes, nonce: bytes, verifier: GpuVerifier, *, at: float
) -> tuple[GpuClaims, ...]:
    """The claims of a host's GPUs when they are what `policy` asks.

    Raises EvidenceRefusedError: `gpu_evidence_missing`, what `GpuVerifier.verify` does, and what the checks do.
    """
    if not evidence:
        raise EvidenceRefusedError(
            "the policy asks for evidence of the host's GPUs; run them in confidential computing mode and send it",
            "gpu_evidence_missing",
        )
    gpus = verifier.verify(evidence, at=at)
    for check in gpu_checks(policy, nonce):
        check.verify(gpus)
    return gpus


@dataclass(frozen=True, slots=True)
class ExpectedGpuNonce:
    """Every GPU answers the challenge of this exchange."""

    nonce: bytes

    def verify(self, gpus: Sequence[GpuClaims]) -> None:
        if not all(hmac.compare_digest(gpu.nonce, self.nonce) for gpu in gpus):
            raise EvidenceRefusedError("a GPU answers another challenge than this exchange's", "gpu_nonce_mismatch")


@dataclass(frozen=True, slots=True)
class GpuCount:
    """There are exactly so many."""

    count: int

    def verify(self, gpus: Sequence[GpuClaims]) -> None:
        if len(gpus) != self.count:
            raise EvidenceRefusedError(f"there is evidence of {len(gpus)} GPUs, not of {self.count}", "gpu_count")


@dataclass(frozen=True, slots=True)
class AllowedGpus:
    """A property of every GPU is in a list."""

    name: str
    """A field of GpuClaims."""
    allowed: Sequence[str]
    field: str
    """Of the policy."""

    def verify(self, gpus: Sequence[GpuClaims]) -> None:
        for gpu in gpus:
            value = getattr(gpu, self.name)
            if value not in self.allowed:
                raise EvidenceRefusedError(
                    f"{self.name} {value!r:.70} of GPU {gpu.device_id} is not in the policy's gpu.{self.field}",
                    f"gpu_{self.name}_not_allowed",
                )
