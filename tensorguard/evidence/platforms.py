"""The platform that this process runs on. This is the one list of what can collect evidence."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.configfs_tsm import REPORT_ROOT, find_provider
from tensorguard.evidence.platform import Platform
from tensorguard.evidence.simulated.collector import SimulatedPlatform

_PLATFORMS: Mapping[EvidenceKind, tuple[str, str]] = {
    EvidenceKind.TDX: ("tensorguard.evidence.tdx.collector", "TdxPlatform"),
    EvidenceKind.SNP: ("tensorguard.evidence.snp.collector", "SnpPlatform"),
    EvidenceKind.NITRO: ("tensorguard.evidence.nitro.collector", "NitroPlatform"),
}
"""Kind -> module and class of its collector."""
_PROVIDERS = {"tdx_guest": EvidenceKind.TDX, "sev_guest": EvidenceKind.SNP}
NITRO_DEVICE = Path("/dev/nsm")


def platform_of(kind: EvidenceKind, *, simulated_root_key: Path | None = None) -> Platform:
    """The collector of a kind. Whether the machine is of this kind shows when it collects.

    `simulated_root_key`: PEM file of the private key that signs simulated evidence. Raises ConfigurationError.
    """
    if kind is EvidenceKind.SIMULATED:
        if simulated_root_key is None:
            raise ConfigurationError("simulated evidence needs the private key file of the root that signs it")
        return SimulatedPlatform(simulated_root_key)
    if kind not in _PLATFORMS:
        raise ConfigurationError(f"this version cannot collect evidence of kind {kind.value}")
    module, name = _PLATFORMS[kind]
    platform: Platform = getattr(importlib.import_module(module), name)()
    return platform


def hardware_kind(*, report_root: Path = REPORT_ROOT, nitro_device: Path = NITRO_DEVICE) -> EvidenceKind | None:
    """The kind of TEE that this machine is, None where it is none that is known."""
    if nitro_device.exists():
        return EvidenceKind.NITRO
    provider = find_provider(report_root)
    return _PROVIDERS.get(provider) if provider is not None else None


def this_platform(*, simulated_root_key: Path | None = None) -> Platform:
    """What collects evidence here: simulated where somebody gave a key for it, and else the machine's own TEE.

    Raises ConfigurationError where the machine is no TEE and there is no key.
    """
    if simulated_root_key is not None:
        return platform_of(EvidenceKind.SIMULATED, simulated_root_key=simulated_root_key)
    kind = hardware_kind()
    if kind is None:
        raise ConfigurationError(
            "this machine is no TEE that is known (TDX and SEV-SNP through configfs-tsm, AWS Nitro through /dev/nsm): "
            "run in one, or set simulated_root_key to attest with simulated evidence, if the policy permits it"
        )
    return platform_of(kind)
