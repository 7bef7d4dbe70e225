"""Collects TDX quotes on the machine that runs the workload."""

from __future__ import annotations

from pathlib import Path

from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.configfs_tsm import REPORT_ROOT, read_report
from tensorguard.evidence.platform import Evidence


class TdxPlatform:
    """A TDX trust domain. Its quotes say nothing about roles: the role is in the report data."""

    kind = EvidenceKind.TDX

    def __init__(self, root: Path = REPORT_ROOT) -> None:
        self._root = root

    def collect(self, report_data: bytes, role: Role) -> Evidence:
        """A quote over 64 bytes of report data. Raises what `read_report` does."""
        return Evidence(read_report(report_data, provider="tdx_guest", root=self._root).outblob)
