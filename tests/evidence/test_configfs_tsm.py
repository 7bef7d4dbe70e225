from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorguard.errors import ConfigurationError, InvalidInputError, UnavailableError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.configfs_tsm import MAX_BLOB_BYTES, TsmReport, read_report
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.tdx.collector import TdxPlatform
from tests.support.fake_tsm import FakeTsm, expected

DATA = bytes(range(64))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tsm" / "report"


def test_report_is_over_the_data_and_the_request_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTsm(root).install(monkeypatch)
    assert read_report(DATA, provider="tdx_guest", root=root) == TsmReport(expected(DATA), b"")
    assert read_report(DATA[::-1], provider="tdx_guest", root=root) == TsmReport(expected(DATA[::-1]), b"")
    assert fake.requests == [DATA, DATA[::-1]]
    assert list(root.iterdir()) == []


def test_what_the_platform_adds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTsm(root, provider="sev_guest\n", auxblob=b"certificates").install(monkeypatch)
    assert read_report(DATA, provider="sev_guest", root=root).auxblob == b"certificates"


def test_a_machine_without_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="offers no attestation reports"):
        TdxPlatform(tmp_path / "nothing").collect(Binding(DATA, b"", b""), Role.COPROCESSOR)


@pytest.mark.parametrize(
    ("machine", "error", "words"),
    [
        ({"provider": "sev_guest\n"}, ConfigurationError, "from 'sev_guest', not from 'tdx_guest'"),
        ({"writes": 2}, UnavailableError, "somebody else wrote"),
        ({"refuses": True}, UnavailableError, "did not answer"),
        ({"outblob": b""}, UnavailableError, "nothing"),
        ({"outblob": b"x" * (MAX_BLOB_BYTES + 1)}, UnavailableError, "larger than"),
        ({"auxblob": b"x" * (MAX_BLOB_BYTES + 1)}, UnavailableError, "larger than"),
        ({"writes": -1}, UnavailableError, "not a number"),
    ],
)
def test_a_machine_that_is_wrong(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    FakeTsm(root, **machine).install(monkeypatch)
    with pytest.raises(error, match=words):
        read_report(DATA, provider="tdx_guest", root=root)
    assert list(root.iterdir()) == []


def test_a_request_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir(mode=0o500)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError):
        read_report(DATA, provider="tdx_guest", root=tmp_path / "file")


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_have_64_bytes(root: Path, size: int) -> None:
    with pytest.raises(InvalidInputError):
        read_report(b"x" * size, provider="tdx_guest", root=root)


def test_tdx_platform(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTsm(root).install(monkeypatch)
    platform = TdxPlatform(root)
    assert platform.kind is EvidenceKind.TDX
    assert platform.collect(Binding(DATA, b"", b""), Role.INFERENCE) == Evidence(expected(DATA))
