"""What collects and what verifies evidence, whichever the platform."""

from __future__ import annotations

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

    def verify(self, evidence: bytes) -> Claims:
        """Raises EvidenceRefusedError when the evidence is malformed or not authentic."""
