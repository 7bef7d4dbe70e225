"""What collects and what verifies evidence, whichever the platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorguard.evidence.claims import Claims, EvidenceKind, Role


class Platform(Protocol):
    """Collects evidence about the process it runs in (the attesting environment)."""

    @property
    def kind(self) -> EvidenceKind:
        """Kind of the evidence it collects."""

    def collect(self, report_data: bytes, role: Role) -> bytes:
        """Evidence over 64 bytes of report data."""


class EvidenceVerifier(Protocol):
    """Checks that evidence is authentic. Whether it is good enough is the policy's decision."""

    @property
    def kind(self) -> EvidenceKind:
        """Kind of the evidence it verifies."""

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        """Check signatures and certificate chains as they stood at the Unix time `at`; nothing is ever fetched.

        `endorsements` is what the platform's maker says about it (certificates, collateral, revocation lists), in any
        order: one element is the content of one file. Raises EvidenceRefusedError when the evidence is malformed, not
        authentic, or an endorsement that it needs is missing, of no use for it or out of its time.
        """
