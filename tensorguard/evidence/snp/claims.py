"""What a verified SEV-SNP report says beyond the claims of every platform."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tensorguard.evidence.snp.product import Product, TcbVersion


class SigningKey(str, Enum):
    """The key that signs reports."""

    VCEK = "vcek"
    """Of one chip at one firmware version."""
    VLEK = "vlek"
    """Of one cloud provider, loaded into all of its chips; their ids may be masked."""


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """What the guest's owner allowed or demanded at launch; enforced by firmware (56860, 4.3)."""

    abi_major: int
    abi_minor: int
    """Lowest version of the firmware interface that the guest runs on."""
    smt: bool
    """May run where simultaneous multithreading is on."""
    migration_agent: bool
    """May be bound to a migration agent, which could read it."""
    debug: bool
    """Its operator may decrypt it."""
    single_socket: bool
    cxl: bool
    """Memory may lie behind CXL."""
    memory_aes_256_xts: bool
    rapl_disabled: bool
    ciphertext_hiding: bool
    page_swap_disabled: bool


@dataclass(frozen=True, slots=True)
class PlatformInfo:
    """How the machine was set up when it reported (56860, ATTESTATION_REPORT.PLATFORM_INFO)."""

    smt: bool
    tsme: bool
    ecc: bool
    rapl_disabled: bool
    ciphertext_hiding: bool
    alias_check: bool
    """Memory was checked for aliased addresses since the last reset (AMD-SB-3015, "BadRAM")."""
    tio: bool


@dataclass(frozen=True, slots=True)
class SnpClaims:
    """A verified report. Byte strings are lower-case hex."""

    report_version: int
    product: Product
    signing_key: SigningKey
    csp_id: str | None
    """Cloud provider that a VLEK belongs to, None for a VCEK."""
    chip_id: str | None
    """64 bytes (Turin: 8 and zeros), None where the operator masks it."""
    vmpl: int
    """Privilege level inside the guest that asked, 0 the highest."""
    guest_svn: int
    guest_policy: GuestPolicy
    platform: PlatformInfo
    reported_tcb: TcbVersion
    """Version that the signing key is derived from."""
    current_tcb: TcbVersion
    committed_tcb: TcbVersion
    """Version below which the machine cannot be rolled back."""
    launch_tcb: TcbVersion
    """Version when the guest was launched."""
    current_firmware: str
    committed_firmware: str
    """major.minor.build of the SNP firmware."""
    family_id: str
    image_id: str
    report_id: str
    report_id_ma: str
    """Of the migration agent, all ones where there is none."""
    launch_mitigations: int | None
    current_mitigations: int | None
    """Bit vectors, None before report version 5."""
    crl_number: int | None
    """Of AMD's revocation list that the chain was checked against, None when none was supplied."""
    certificate_expires_at: int
    """Unix seconds: the end of the signing key's certificate."""
