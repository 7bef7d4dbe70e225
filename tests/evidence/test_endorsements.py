from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.endorsements import MAX_FILE_BYTES, MAX_FILES, EndorsementDirectory, read_endorsement


def test_each_kind_has_its_folder(tmp_path: Path) -> None:
    for name in ("tdx", "snp"):
        (tmp_path / name).mkdir()
    (tmp_path / "tdx" / "b").write_bytes(b"second")
    (tmp_path / "tdx" / "a").write_bytes(b"first")
    (tmp_path / "tdx" / ".hidden").write_bytes(b"no")
    (tmp_path / "tdx" / "folder").mkdir()
    (tmp_path / "snp" / "a").write_bytes(b"other")
    directory = EndorsementDirectory(tmp_path)
    assert directory.of(EvidenceKind.TDX) == (b"first", b"second")
    assert directory.of(EvidenceKind.SNP) == (b"other",)
    assert directory.of(EvidenceKind.NITRO) == ()


def test_new_files_count_at_once(tmp_path: Path) -> None:
    directory = EndorsementDirectory(tmp_path)
    assert directory.of(EvidenceKind.TDX) == ()
    (tmp_path / "tdx").mkdir()
    (tmp_path / "tdx" / "a").write_bytes(b"one")
    assert directory.of(EvidenceKind.TDX) == (b"one",)
    assert directory.of(EvidenceKind.TDX) is directory.of(EvidenceKind.TDX)
    (tmp_path / "tdx" / "a").write_bytes(b"other")
    assert directory.of(EvidenceKind.TDX) == (b"other",)
    (tmp_path / "tdx" / "a").unlink()
    assert directory.of(EvidenceKind.TDX) == ()


def test_no_directory_has_none() -> None:
    assert EndorsementDirectory(None).of(EvidenceKind.TDX) == ()


def test_bounds(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not there"):
        EndorsementDirectory(tmp_path / "nowhere")
    folder = tmp_path / "tdx"
    folder.mkdir()
    (folder / "large").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigurationError, match="larger than"):
        EndorsementDirectory(tmp_path).of(EvidenceKind.TDX)
    with pytest.raises(ConfigurationError, match="larger than"):
        read_endorsement(folder / "large")
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_endorsement(folder / "none")
    (folder / "large").unlink()
    for number in range(MAX_FILES + 1):
        (folder / f"{number}").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="more than"):
        EndorsementDirectory(tmp_path).of(EvidenceKind.TDX)
