"""What collects and what verifies evidence, whichever the platform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.report_data import Binding


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a platform says about a workload, and what it has at hand of what its maker says about the platform."""

    evidence: bytes
    endorsements: tuple[bytes, ...] = ()
    """As for `EvidenceVerifier.verify`. Not trusted for where they come from: whoever verifies verifies them, too."""


class Platform(Protocol):
    """Collects evidence about the process it runs in (the attesting environment)."""

    @property
    def kind(self) -> EvidenceKind:
        """Kind of the evidence it collects."""

    def collect(self, binding: Binding, role: Role) -> Evidence:
        """Evidence over the report data, and over the nonce and the key where the platform has fields for them.

        Raises ConfigurationError where the machine is no such platform, UnavailableError where it is and fails.
        """


class GpuPlatform(Protocol):
    """Collects evidence about the GPUs of the machine it runs on."""

    def collect(self, nonce: bytes) -> bytes:
        """Reports over a nonce of 32 bytes, as `tensorguard.evidence.nvidia.verifier` reads them.

        Raises ConfigurationError where there are no such GPUs, UnavailableError where there are and they fail.
        """


class EvidenceVerifier(Protocol):
    """Checks that evidence is authentic. Whether it is good enough is the policy's decision."""

    @property
    def kind(self) -> EvidenceKind:
        """Kind of the evidence it verifies."""

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        """Check signatures and certificate chains as they stood at the Unix time `at`; nothing is ever fetched.

        `endorsements` is what the platform's maker says about it (certificates, collateral, revocation lists), in any
        order: one element is the content of one file. Those of other platforms of the same kind are left aside.
        Raises EvidenceRefusedError when the evidence is malformed, not authentic, or an endorsement that it needs is
        missing, of no use for it or out of its time.
        """

    def check_endorsement(self, endorsement: bytes) -> None:
        """Raises EvidenceRefusedError, as `verify` would with any evidence, for a file that is no endorsement."""
