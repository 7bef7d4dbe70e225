"""`tensafe measure`: entries that a policy takes as they are, and clear refusals of what cannot be derived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tensorguard.cli.main import run
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.policy import MeasurementTuple
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.evidence.test_reference_values import PCRS, description
from tests.support.synthetic_pki.tdx import MRTD, Collateral, Pki, Quote

AT = "2026-05-28T20:26:40Z"


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(["measure", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Options that name a quote of the made-up authority, which stands in for Intel's."""
    (tmp_path / "evidence").write_bytes(Quote().encode())
    (tmp_path / "collateral").write_bytes(Collateral().bundle())
    made_up = TdxVerifier((Pki().root_fingerprint,))
    monkeypatch.setattr("tensorguard.evidence.tdx.verifier.TdxVerifier", lambda: made_up)
    return ["--evidence", tmp_path / "evidence", "--endorsements", tmp_path / "collateral", "--at", AT]


def test_what_is_printed_is_an_entry_of_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = measured(capsys, "simulated")
    assert code == 0
    [entry] = yaml.safe_load(out)
    found = MeasurementTuple.model_validate(entry)
    assert (found.evidence_kind, found.values) == (EvidenceKind.SIMULATED, {"code": code_measurement()})
    assert json.loads(measured(capsys, "simulated", "--json")[1]) == entry


def test_of_an_enclave_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "image.json"
    image.write_bytes(description(PCRS))
    code, out, _ = measured(capsys, "nitro", "--image", image, "--json")
    assert (code, json.loads(out)["values"]["pcr8"]) == (0, PCRS["PCR8"])
    image.write_bytes(description({}))
    code, out, err = measured(capsys, "nitro", "--image", image)
    assert (code, out) == (2, "") and "PCR0" in err and "[configuration]" in err
    code, _, err = measured(capsys, "nitro", "--image", tmp_path / "absent")
    assert code == 2 and "absent" in err


def test_of_verified_evidence(capsys: pytest.CaptureFixture[str], quote: list[object]) -> None:
    code, out, _ = measured(capsys, "tdx", *quote, "--register", "mrseam")
    assert code == 0
    [entry] = yaml.safe_load(out)
    values = MeasurementTuple.model_validate(entry).values
    assert values["mrtd"] == MRTD.hex()
    assert values.keys() == {"mrtd", "rtmr0", "rtmr1", "rtmr2", "mrseam"}


def test_several_endorsements_follow_one_option(
    capsys: pytest.CaptureFixture[str], quote: list[object], tmp_path: Path
) -> None:
    """As `tensafe evidence verify` takes them."""
    parts = [tmp_path / f"part{number}" for number in range(5)]
    for path, part in zip(parts, Collateral().parts(), strict=True):
        path.write_bytes(part)
    evidence, at = quote[:2], quote[4:]
    code, out, _ = measured(capsys, "tdx", *evidence, *at, "--endorsements", *parts, "--json")
    assert (code, json.loads(out)["values"]["mrtd"]) == (0, MRTD.hex())


def test_evidence_that_does_not_verify_gives_no_measurement(
    capsys: pytest.CaptureFixture[str], quote: list[object], tmp_path: Path
) -> None:
    changed = bytearray(Quote().encode())
    changed[200] ^= 1  # in MRTD
    (tmp_path / "evidence").write_bytes(changed)
    code, out, err = measured(capsys, "tdx", *quote)
    assert (code, out) == (3, "") and "[evidence_refused]" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["snp"], "sev-snp-measure"),
        (["snp", "--image", "x"], "sev-snp-measure"),
        (["tdx"], "MRTD and RTMR0 to RTMR2 depend on"),
        (["nitro"], "nitro-cli build-enclave"),
        (["simulated", "--image", "x"], "--image is for nitro"),
        (["simulated", "--evidence", "x"], "--evidence goes with"),
        (["nitro", "--image", "x", "--evidence", "y"], "without --image"),
        (["tdx", "--register", "mrseam"], "go with --evidence"),
    ],
)
def test_what_cannot_be_derived_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = measured(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err and "[configuration]" in err
