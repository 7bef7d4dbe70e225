from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.endorsements import MAX_FILE_BYTES, MAX_FILES, EndorsementDirectory, read_endorsement
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.snp.verifier import SnpVerifier
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.synthetic_pki import snp, tdx


class Words:
    """Whatever is a word is an endorsement."""

    kind = EvidenceKind.TDX

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        raise NotImplementedError

    def check_endorsement(self, endorsement: bytes) -> None:
        if not endorsement.isalpha():
            raise EvidenceRefusedError("this is no word", "malformed")


def directory_of(path: Path | None) -> EndorsementDirectory:
    return EndorsementDirectory(path, dict.fromkeys(EvidenceKind, Words()))


def test_each_kind_has_its_folder(tmp_path: Path) -> None:
    for name in ("tdx", "snp"):
        (tmp_path / name).mkdir()
    (tmp_path / "tdx" / "b").write_bytes(b"second")
    (tmp_path / "tdx" / "a").write_bytes(b"first")
    (tmp_path / "tdx" / ".hidden").write_bytes(b"no")
    (tmp_path / "tdx" / "folder").mkdir()
    (tmp_path / "snp" / "a").write_bytes(b"other")
    directory = directory_of(tmp_path)
    assert directory.of(EvidenceKind.TDX) == (b"first", b"second")
    assert directory.of(EvidenceKind.SNP) == (b"other",)
    assert directory.of(EvidenceKind.NITRO) == ()


def test_new_files_count_at_once(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
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
    assert directory_of(None).of(EvidenceKind.TDX) == ()


def test_bounds(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not there"):
        directory_of(tmp_path / "nowhere")
    folder = tmp_path / "tdx"
    folder.mkdir()
    (folder / "large").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigurationError, match="larger than"):
        directory_of(tmp_path).of(EvidenceKind.TDX)
    with pytest.raises(ConfigurationError, match="larger than"):
        read_endorsement(folder / "large")
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_endorsement(folder / "none")
    (folder / "large").unlink()
    for number in range(MAX_FILES + 1):
        (folder / f"{number}").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="more than"):
        directory_of(tmp_path).of(EvidenceKind.TDX)


def test_a_file_that_is_no_endorsement_is_named_and_never_left_aside(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    (tmp_path / "tdx").mkdir()
    (tmp_path / "tdx" / "good").write_bytes(b"word")
    directory.check([EvidenceKind.TDX])
    (tmp_path / "tdx" / "revoked.crl").write_bytes(b"%%%")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"tdx/revoked\.crl cannot be used: this is no word \[malformed\]"):
            directory.of(EvidenceKind.TDX)
    with pytest.raises(ConfigurationError, match=r"revoked\.crl"):
        directory.check([EvidenceKind.SNP, EvidenceKind.TDX])
    directory.check([EvidenceKind.SNP])
    (tmp_path / "tdx" / "revoked.crl").unlink()
    assert directory.of(EvidenceKind.TDX) == (b"word",)


@pytest.mark.parametrize(
    ("verifier", "good", "bad"),
    [
        (
            TdxVerifier(),
            tdx.Collateral().parts(),
            [(b"", "endorsement_unused"), (b"{", "malformed"), (b"{" * 9999, "malformed"), (b"0", "malformed")],
        ),
        (
            SnpVerifier(),
            [*snp.chip().endorsements, snp.chip().ark.revoke()],
            [(b"x", "endorsement_unused"), (b"0", "malformed"), (b"-----BEGIN CERTIFICATE-----", "malformed")],
        ),
        (NitroVerifier(), [], [(b"", "endorsement_unused"), (tdx.Collateral().parts()[0], "endorsement_unused")]),
    ],
)
def test_a_verifier_knows_its_endorsements(
    verifier: EvidenceVerifier, good: Sequence[bytes], bad: Sequence[tuple[bytes, str]]
) -> None:
    for endorsement in good:
        verifier.check_endorsement(endorsement)
    for endorsement, reason in bad:
        with pytest.raises(EvidenceRefusedError) as refused:
            verifier.check_endorsement(endorsement)
        assert refused.value.detail == reason
