"""Collects SEV-SNP reports on the machine that runs the workload."""

from __future__ import annotations

from pathlib import Path

from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.configfs_tsm import REPORT_ROOT, read_report
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding


class SnpPlatform:
    """An SEV-SNP guest. Its reports say nothing about roles: the role is in the report data."""

    kind = EvidenceKind.SNP

    def __init__(self, root: Path = REPORT_ROOT) -> None:
        self._root = root

    def collect(self, binding: Binding, role: Role) -> Evidence:
        """A report over 64 bytes of report data, with the certificates that the host has for it, if any.

        Raises what `read_report` does.
        """
        report = read_report(binding.report_data, provider="sev_guest", root=self._root)
        return Evidence(report.outblob, (report.auxblob,) if any(report.auxblob) else ())
