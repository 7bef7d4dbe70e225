"""Sections of policies that tests change."""

from __future__ import annotations

from typing import Any

TDX_SECTION: dict[str, Any] = {
    "tcb_statuses": ["UpToDate"],
    "denied_advisories": [],
    "min_tcb_eval_data_number": 17,
    "allow_dynamic_platform": False,
    "allow_cached_keys": False,
    "allow_smt": False,
    "machines": "any",
}
"""The strictest one without lists of machines."""


def tdx_policy(registers: dict[str, str], **section: Any) -> dict[str, Any]:
    """A policy for one coprocessor in a TDX trust domain with these registers."""
    return {
        "version": 1,
        "id": "tdx-test",
        "evidence_kinds": ["tdx"],
        "tenants": ["tenant"],
        "roles": {"coprocessor": {"measurements": [{"evidence_kind": "tdx", "values": registers}]}},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        "tdx": {**TDX_SECTION, **section},
    }


_SNP_FLOOR: dict[str, int] = {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}
SNP_SECTION: dict[str, Any] = {
    "tcb_floors": {"milan": dict.fromkeys(("reported", "current", "committed", "launch"), _SNP_FLOOR)},
    "signing_keys": ["vcek"],
    "vmpls": [0],
    "minimum_abi": {"major": 0, "minor": 0},
    "minimum_guest_svn": 0,
    "allow_smt": True,
    "allow_migration_agent": False,
    "allow_cxl": False,
    "required_guest_policy": [],
    "required_platform": ["alias_check"],
    "chip_ids": "any",
    "revoked_chip_ids": [],
    "require_crl": False,
}
"""Accepts what the synthetic Milan chip reports by default."""


def snp_policy(registers: dict[str, str], **section: Any) -> dict[str, Any]:
    """A policy for one coprocessor in an SEV-SNP guest with these registers."""
    return {
        "version": 1,
        "id": "snp-test",
        "evidence_kinds": ["snp"],
        "tenants": ["tenant"],
        "roles": {"coprocessor": {"measurements": [{"evidence_kind": "snp", "values": registers}]}},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        "snp": {**SNP_SECTION, **section},
    }
