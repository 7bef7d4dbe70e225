from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.platforms import platform_of
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.snp.collector import SnpPlatform
from tests.evidence.snp.conftest import verify
from tests.support.fake_tsm import FakeTsm, expected
from tests.support.synthetic_pki import snp

DATA = bytes(range(64))
BINDING = Binding(DATA, b"nonce", b"key")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tsm" / "report"


def test_what_the_kernel_hands_out_is_what_the_verifier_takes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = snp.chip()
    vcek, ask, ark = chip.endorsements
    table = snp.certificate_table(
        [
            ("c0b406a4-a803-4952-9743-3fb6014cd0ae", ark),
            ("4ab7b379-bbac-4fe4-a02f-05aef327c782", ask),
            ("63da758d-e664-4564-adc5-f4b93be8accd", vcek),
        ]
    )
    FakeTsm(root, provider="sev_guest\n", outblob=chip.report(), auxblob=table).install(monkeypatch)
    collected = SnpPlatform(root).collect(BINDING, Role.COPROCESSOR)
    assert collected.endorsements == (table,)
    verify(chip, report=collected.evidence, endorsements=collected.endorsements)


@pytest.mark.parametrize("auxblob", [None, b"", bytes(24), bytes(4096)])
def test_a_host_without_certificates(root: Path, monkeypatch: pytest.MonkeyPatch, auxblob: bytes | None) -> None:
    FakeTsm(root, provider="sev_guest\n", auxblob=auxblob).install(monkeypatch)
    assert SnpPlatform(root).collect(BINDING, Role.COPROCESSOR) == Evidence(expected(DATA), ())


def test_another_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTsm(root, provider="tdx_guest\n").install(monkeypatch)
    with pytest.raises(ConfigurationError, match="not from 'sev_guest'"):
        SnpPlatform(root).collect(BINDING, Role.COPROCESSOR)


def test_it_is_listed() -> None:
    assert platform_of(EvidenceKind.SNP).kind is EvidenceKind.SNP
