"""Typed claims: what a verified piece of evidence says, the same for every kind of platform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.snp.claims import SnpClaims
from tensorguard.evidence.tdx.claims import TdxClaims


class EvidenceKind(str, Enum):
    """The platforms whose evidence has a name. A build may verify fewer than it names."""

    SIMULATED = "simulated"
    TDX = "tdx"
    SNP = "snp"
    NITRO = "nitro"


class Role(str, Enum):
    """The part a workload plays."""

    INFERENCE = "inference"
    COPROCESSOR = "coprocessor"


REQUIRED_MEASUREMENTS: Mapping[EvidenceKind, frozenset[str]] = {
    EvidenceKind.SIMULATED: frozenset({"code"}),
    EvidenceKind.TDX: frozenset({"mrtd", "rtmr0", "rtmr1", "rtmr2"}),
    EvidenceKind.SNP: frozenset({"measurement"}),
    EvidenceKind.NITRO: frozenset({"pcr0", "pcr1", "pcr2"}),
}
"""Registers that a measurement tuple of a kind must name: without them it would allow any code.

TDX: MRTD is the firmware alone; RTMR0 has its configuration with the ACPI tables, which contain code, RTMR1 the
kernel, and RTMR2 its command line and initial file system.
"""


@dataclass(frozen=True, slots=True)
class Claims:
    """What authentic evidence says about a workload. Not yet a decision: that is the policy's."""

    kind: EvidenceKind
    measurements: Mapping[str, str]
    """Register name -> value, lower-case hex."""
    report_data: bytes
    """64 bytes the workload chose: `tensorguard.evidence.report_data`."""
    issued_at: int | None
    """Unix seconds by the platform's own clock, None where the platform has none."""
    debug: bool
    """True when the platform lets its operator look inside."""
    role: Role | None = None
    """Role the evidence itself names, None where a platform cannot."""
    details: TdxClaims | SnpClaims | NitroClaims | None = None
    """What only platforms of this kind say."""
    nonce: bytes | None = None
    """The challenge, where evidence of this kind has a field of its own for it."""
