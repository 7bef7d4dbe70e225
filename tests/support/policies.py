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
