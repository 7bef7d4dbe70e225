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
