"""Collects TDX quotes on the machine that runs the workload."""

from __future__ import annotations

from pathlib import Path

from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.configfs_tsm import REPORT_ROOT, read_report
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding


class TdxPlatform:
    """A TDX trust domain. Its quotes say nothing about roles: the role is in the report data."""

    kind = EvidenceKind.TDX

    def __init__(self, root: Path = REPORT_ROOT) -> None:
        self._root = root

    def collect(self, binding: Binding, role: Role) -> Evidence:
        """A quote over 64 bytes of report data. Raises what `read_report` does."""
        return Evidence(read_report(binding.report_data, provider="tdx_guest", root=self._root).outblob)
