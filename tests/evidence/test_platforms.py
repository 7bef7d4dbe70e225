from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.platforms import hardware_kind, platform_of
from tests.support.fake_tsm import FakeTsm


@pytest.mark.parametrize(
    ("provider", "kind"),
    [("tdx_guest\n", EvidenceKind.TDX), ("sev_guest\n", EvidenceKind.SNP), ("arm_cca_guest\n", None)],
)
def test_the_kernels_driver_says_what_the_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, kind: EvidenceKind | None
) -> None:
    root = tmp_path / "tsm" / "report"
    FakeTsm(root, provider=provider).install(monkeypatch)
    assert hardware_kind(report_root=root, nitro_device=tmp_path / "nsm") is kind
    assert list(root.iterdir()) == []


def test_other_machines(tmp_path: Path) -> None:
    assert hardware_kind(report_root=tmp_path / "none", nitro_device=tmp_path / "nsm") is None
    (tmp_path / "nsm").touch()
    assert hardware_kind(report_root=tmp_path / "none", nitro_device=tmp_path / "nsm") is EvidenceKind.NITRO


def test_platforms_by_kind() -> None:
    assert platform_of(EvidenceKind.TDX).kind is EvidenceKind.TDX
    with pytest.raises(ConfigurationError, match="private key"):
        platform_of(EvidenceKind.SIMULATED)
