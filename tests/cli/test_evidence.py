"""`tensafe evidence verify` and `tensafe policy`: decisions, reasons and exit codes, on quotes that the tests sign."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tensorguard.cli.main import run
from tensorguard.evidence import verifiers
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.attestation_vectors import vector_directory
from tests.support.policies import tdx_policy
from tests.support.synthetic_pki.tdx import MRTD, REPORT_DATA, Collateral, Pki, Quote

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "attestation.md"
AT = "2026-05-28T20:26:40Z"
REGISTERS = {
    "mrtd": MRTD.hex(),
    "rtmr0": "20" * 48,
    "rtmr1": "21" * 48,
    "rtmr2": "22" * 48,
}
CLOUD = {"allow_dynamic_platform": True, "allow_cached_keys": True, "allow_smt": True}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tensafe(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@dataclass
class Files:
    """What the commands read; `write` changes one."""

    folder: Path

    def write(self, name: str, content: bytes | str | dict[str, Any]) -> Path:
        path = self.folder / name
        data = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def options(self, **changes: object) -> list[object]:
        options: dict[str, object] = {
            "kind": "tdx",
            "evidence": self.folder / "quote",
            "endorsements": self.folder / "collateral",
            "policy": self.folder / "policy.json",
            "at": AT,
        } | changes
        return [item for name, value in options.items() for item in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A quote of the made-up authority, which stands in for Intel's: the commands have no option for another root."""
    found = Files(tmp_path)
    found.write("quote", Quote().encode())
    found.write("collateral", Collateral().bundle())
    found.write("policy.json", tdx_policy(REGISTERS))
    made_up = TdxVerifier((Pki().root_fingerprint,))
    monkeypatch.setattr("tensorguard.evidence.tdx.verifier.TdxVerifier", lambda: made_up)
    return found


def decide(tensafe: Run, files: Files, **changes: object) -> tuple[int, dict[str, Any]]:
    code, out, err = tensafe("evidence", "verify", *files.options(**changes), "--json")
    report = json.loads(out)
    assert report["accepted"] == (code == 0)
    assert (f"[{report['reason']}]" in err) == (code != 0)
    return code, report


def test_accepted(tensafe: Run, files: Files) -> None:
    code, report = decide(tensafe, files)
    assert (code, report["accepted"], report["reason"], report["message"]) == (0, True, "", "")
    assert (report["kind"], report["at"], report["exchange_checked"]) == ("tdx", AT, False)
    assert report["policy"]["id"] == "tdx-test" and len(report["policy"]["sha256"]) == 64
    claims = report["claims"]
    assert claims["report_data"] == REPORT_DATA.hex()
    assert claims["measurements"]["mrtd"] == MRTD.hex()
    assert claims["details"]["tcb_status"] == "UpToDate"
    assert claims["kind"] == "tdx"


def test_text(tensafe: Run, files: Files) -> None:
    code, out, _ = tensafe("evidence", "verify", *files.options())
    assert code == 0 and "accepted by policy tdx-test (of no exchange" in out
    files.write("policy.json", tdx_policy({**REGISTERS, "rtmr2": "ff" * 48}))
    code, out, err = tensafe("evidence", "verify", *files.options())
    assert code == 3 and '"mrtd"' in out and "[measurement_not_allowed]" in err


def test_refused_with_the_reason_and_the_claims(tensafe: Run, files: Files) -> None:
    files.write("collateral", Collateral(status="OutOfDate").bundle())
    code, report = decide(tensafe, files)
    assert (code, report["reason"]) == (3, "tcb_status_not_allowed")
    assert report["claims"]["details"]["tcb_status"] == "OutOfDate"
    files.write("policy.json", tdx_policy(REGISTERS, tcb_statuses=["UpToDate", "OutOfDate"]))
    assert decide(tensafe, files)[0] == 0


def test_what_is_not_authentic_has_no_claims(tensafe: Run, files: Files) -> None:
    quote = bytearray(Quote().encode())
    quote[200] ^= 1
    files.write("quote", bytes(quote))
    code, report = decide(tensafe, files)
    assert (code, report["reason"], report["claims"]) == (3, "signature", None)


def test_time(tensafe: Run, files: Files) -> None:
    assert decide(tensafe, files, at="2026-07-28T00:00:00Z")[1]["reason"] == "collateral_expired"
    assert decide(tensafe, files, at="2026-05-28T22:26:40+02:00")[0] == 0


@pytest.mark.parametrize(
    ("nonce", "code"),
    [(REPORT_DATA.hex(), 0), ("0x" + REPORT_DATA.hex(), 0), (REPORT_DATA[:32].hex(), 3), ("00", 3)],
)
def test_nonce_is_all_of_the_report_data(tensafe: Run, files: Files, nonce: str, code: int) -> None:
    found, report = decide(tensafe, files, nonce=nonce)
    assert (found, report["reason"]) == (code, "nonce_mismatch" if code else "")
    assert report["exchange_checked"] is True


def test_a_short_nonce_is_filled_up_with_zeros(tensafe: Run, files: Files) -> None:
    files.write("quote", Quote(report_data=b"n" * 32 + bytes(32)).encode())
    assert decide(tensafe, files, nonce=(b"n" * 32).hex())[0] == 0


def test_report_data(tensafe: Run, files: Files) -> None:
    assert decide(tensafe, files, report_data=REPORT_DATA.hex())[0] == 0
    assert decide(tensafe, files, report_data=(b"x" * 64).hex())[1]["reason"] == "report_data_mismatch"
    assert decide(tensafe, files, report_data=REPORT_DATA[:63].hex())[1]["reason"] == "report_data_mismatch"


def test_role(tensafe: Run, files: Files) -> None:
    assert decide(tensafe, files, role="coprocessor")[0] == 0
    assert decide(tensafe, files, role="inference")[1]["reason"] == "role_not_allowed"


def test_a_kind_that_the_policy_does_not_name(tensafe: Run, files: Files) -> None:
    policy = tdx_policy(REGISTERS)
    simulated = [{"evidence_kind": "simulated", "values": {"code": "ab" * 48}}]
    policy.update(evidence_kinds=["simulated"], roles={"coprocessor": {"measurements": simulated}})
    del policy["tdx"]
    files.write("policy.json", policy)
    files.write("quote", b"nobody reads this")
    assert decide(tensafe, files)[1]["reason"] == "evidence_kind_not_allowed"


def test_evidence_as_hexadecimal_text(tensafe: Run, files: Files) -> None:
    for text in (Quote().encode().hex(), "0x" + Quote().encode().hex().upper() + "\n"):
        files.write("quote", text)
        assert decide(tensafe, files)[0] == 0


def test_endorsements_of_a_folder(tensafe: Run, files: Files) -> None:
    folder = files.folder / "parts"
    folder.mkdir()
    for number, part in enumerate(Collateral().parts()):
        (folder / str(number)).write_bytes(part)
    assert decide(tensafe, files, endorsements=folder)[0] == 0


def test_endorsements_of_several_files(tensafe: Run, files: Files) -> None:
    parts = [files.write(f"part{number}", part) for number, part in enumerate(Collateral().parts())]
    repeated = [item for path in parts[1:] for item in ("--endorsements", path)]
    code, out, _ = tensafe("evidence", "verify", *files.options(endorsements=parts[0]), *repeated, "--json")
    assert (code, json.loads(out)["reason"]) == (0, "")
    options = files.options()
    at = options.index("--endorsements")
    options[at : at + 2] = ["--endorsements", *parts]
    assert tensafe("evidence", "verify", *options)[0] == 0
    at = options.index("--policy")
    del options[at : at + 2]
    assert tensafe("policy", "explain", files.folder / "policy.json", *options)[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "mock"},
        {"evidence": "nowhere"},
        {"evidence": "/dev/null"},
        {"endorsements": "nowhere"},
        {"policy": "nowhere"},
        {"at": "yesterday"},
        {"at": "2026-05-28T20:26:40"},
        {"at": "1960-01-01T00:00:00Z"},
        {"nonce": "xyz"},
        {"nonce": "abc"},
        {"nonce": "00" * 513},
        {"report_data": "00" * 513},
        {"role": "admin"},
    ],
)
def test_wrong_usage(tensafe: Run, files: Files, changes: dict[str, object]) -> None:
    code, out, err = tensafe("evidence", "verify", *files.options(**changes), "--json")
    assert (code, out) == (2, "") and err


def test_oversized_files(tensafe: Run, files: Files) -> None:
    files.write("quote", b"\1" * (64 * 1024 + 1))
    assert tensafe("evidence", "verify", *files.options())[0] == 2
    files.write("quote", "00" * (64 * 1024 + 1))
    assert tensafe("evidence", "verify", *files.options())[0] == 2


def test_simulated(tensafe: Run, tmp_path: Path) -> None:
    state = initialise_development_state(tmp_path / "state", "tenant", measurement="ab" * 48)
    platform = SimulatedPlatform(state.simulated_root_key, measurement="ab" * 48, clock=lambda: 1_779_999_999)
    files = Files(tmp_path)
    files.write("quote", platform.collect(Binding(REPORT_DATA, b"", b""), Role.COPROCESSOR).evidence)
    options = ["--kind", "simulated", "--evidence", tmp_path / "quote", "--policy", state.policy_file, "--at", AT]
    code, _, err = tensafe("evidence", "verify", *options)
    assert code == 2 and "public key" in err
    options += ["--simulated-root", state.simulated_root_public_key]
    assert tensafe("evidence", "verify", *options)[0] == 0
    assert tensafe("evidence", "verify", *options, "--report-data", REPORT_DATA.hex())[0] == 0
    code, _, err = tensafe("evidence", "verify", *options, "--role", "inference")
    assert code == 3 and "[role_mismatch]" in err


def test_explain_names_every_check_that_fails(tensafe: Run, files: Files) -> None:
    files.write("collateral", Collateral(status="OutOfDate", advisories=("INTEL-SA-00837",)).bundle())
    policy = tdx_policy(
        {**REGISTERS, "rtmr2": "ff" * 48},
        denied_advisories=["INTEL-SA-00837"],
        min_tcb_eval_data_number=18,
        machines=["ff" * 16],
    )
    options = files.options()
    at = options.index("--policy")
    del options[at : at + 2]
    path = files.write("policy.json", policy)
    code, out, _ = tensafe("policy", "explain", path, *options, "--nonce", "00", "--json")
    report = json.loads(out)
    assert (code, report["reason"]) == (3, "nonce_mismatch")
    assert [item["reason"] for item in report["refusals"]] == [
        "nonce_mismatch",
        "tcb_status_not_allowed",
        "advisory_denied",
        "tcb_eval_data_number",
        "machine_not_allowed",
        "measurement_not_allowed",
    ]
    code, out, _ = tensafe("policy", "explain", path, *options)
    assert code == 3 and out.count("\n") == 5 and "advisory_denied: " in out
    files.write("collateral", Collateral().bundle())
    files.write("policy.json", tdx_policy(REGISTERS))
    assert tensafe("policy", "explain", path, *options)[0] == 0
    files.write("quote", b"not a quote")
    code, out, _ = tensafe("policy", "explain", path, *options)
    assert code == 3 and "not authentic" in out and "malformed: " in out


def test_real_quote_with_a_policy_for_it(tensafe: Run, tmp_path: Path) -> None:
    folder = vector_directory("tdx")
    expected = json.loads((folder / "expected.json").read_text())[0]
    files = Files(tmp_path)
    registers = {"mrtd": expected["mr_td"], **{f"rtmr{i}": expected["rtmr"][i] for i in range(3)}}
    files.write("policy.json", tdx_policy(registers, **CLOUD))
    given = {
        "evidence": folder / expected["quote"],
        "endorsements": folder / "dcapqvl_tdx_quote_collateral.json",
        "at": expected["verify_at"],
    }
    assert decide(tensafe, files, **given, report_data=expected["report_data"])[0] == 0
    files.write("policy.json", tdx_policy(registers))
    assert decide(tensafe, files, **given)[1]["reason"] == "dynamic_platform_not_allowed"
    hexadecimal = folder / "dcapqvl_tdx-quote.hex"
    assert decide(tensafe, files, **{**given, "evidence": hexadecimal})[1]["reason"] == "tcb_level_not_found"


@pytest.mark.parametrize(
    ("kind", "evidence", "endorsements", "at"),
    [
        ("tdx", "dcapqvl_tdx_quote", ["dcapqvl_tdx_quote_collateral.json"], "2025-07-19T09:00:35Z"),
        ("snp", "virtee_report_milan.hex", ["virtee_vcek_milan.der", "ask_ark_milan.pem"], "2024-01-01T00:00:00Z"),
    ],
)
def test_documented_policies_and_real_evidence(
    tensafe: Run, tmp_path: Path, kind: str, evidence: str, endorsements: list[str], at: str
) -> None:
    folder = vector_directory(kind)
    found = re.search(rf"```yaml\n(version: 1\nid: {kind}-example\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    policy = Files(tmp_path).write("policy.yaml", found[1])
    options: list[object] = ["--kind", kind, "--evidence", folder / evidence, "--policy", policy, "--at", at, "--json"]
    code, out, _ = tensafe("evidence", "verify", *options, "--endorsements", *(folder / name for name in endorsements))
    report = json.loads(out)
    assert (code, report["reason"]) == (0, "")
    assert report["claims"]["kind"] == kind
    code, out, _ = tensafe("evidence", "verify", *options)
    assert (code, json.loads(out)["reason"]) == (3, "collateral_missing")
    code, out, _ = tensafe("evidence", "verify", *options, "--endorsements", folder / endorsements[-1], "--nonce", "aa")
    assert code == 3


def test_a_kind_without_a_verifier_is_no_option(tensafe: Run, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "_VERIFIERS", {})
    code, _, err = tensafe("evidence", "verify", *files.options(kind=EvidenceKind.TDX.value))
    assert code == 2 and "cannot verify evidence of kind tdx" in err
