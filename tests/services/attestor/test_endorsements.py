"""A TDX coprocessor attests: its quote carries the report data, the attestor's own directory has the collateral."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.attestor.appraiser import MAX_ENDORSEMENTS, MAX_ENDORSEMENTS_BYTES
from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import ConfigurationError, EvidenceRefusedError, InvalidInputError, TenSafeError
from tensorguard.evidence import verifiers
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.result import AttestationResult
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.audit import last_record
from tests.support.policies import tdx_policy
from tests.support.synthetic_pki.tdx import DAY, MRTD, NOW, Collateral, Pki, Quote

REGISTERS = {"mrtd": MRTD.hex(), "rtmr0": "20" * 48, "rtmr1": "21" * 48, "rtmr2": "22" * 48}


@dataclass(frozen=True)
class MadeUpTdx:
    """A platform of the made-up authority."""

    endorsements: tuple[bytes, ...] = ()
    kind: EvidenceKind = EvidenceKind.TDX
    fixed: bytes | None = None

    def collect(self, binding: Binding, role: Role) -> Evidence:
        return Evidence(Quote(report_data=self.fixed or binding.report_data).encode(), self.endorsements)


@dataclass
class Site:
    """A running attestor whose policy names TDX."""

    folder: Path
    settings: AttestorSettings
    attestor: Attestor

    def attest(self, platform: MadeUpTdx) -> AttestationResult:
        client = AttestorClient(self.attestor.server.address, clock=lambda: NOW)
        try:
            token = client.attest(
                WorkloadIdentity.generate(), platform, role=Role.COPROCESSOR, tenant="tenant", package_id="package"
            )
            return client.verifier().verify(token)
        finally:
            client.close()

    def refusal(self, platform: MadeUpTdx) -> tuple[type[TenSafeError], str]:
        """The error, and what the audit log has as its reason."""
        with pytest.raises(TenSafeError) as refused:
            self.attest(platform)
        last = last_record(self.attestor.state)
        return type(refused.value), last["detail"]


def settings(folder: Path) -> AttestorSettings:
    (folder / "policy.json").write_text(json.dumps(tdx_policy(REGISTERS)))
    (folder / "endorsements" / "tdx").mkdir(parents=True)
    return AttestorSettings(
        state_dir=folder / "state",
        policy_file=folder / "policy.json",
        listen="127.0.0.1:0",
        endorsements_dir=folder / "endorsements",
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made_up = TdxVerifier((Pki().root_fingerprint,))
    monkeypatch.setattr("tensorguard.evidence.tdx.verifier.TdxVerifier", lambda: made_up)
    given = settings(tmp_path)
    attestor = build_attestor(given, clock=lambda: NOW)
    attestor.server.start()
    yield Site(tmp_path, given, attestor)
    attestor.server.stop(0)
    attestor.close()


def test_collateral_of_the_directory_counts_as_soon_as_it_is_there(site: Site) -> None:
    assert site.refusal(MadeUpTdx()) == (EvidenceRefusedError, "collateral_missing")
    (site.folder / "endorsements" / "tdx" / "collateral.json").write_bytes(Collateral().bundle())
    assert site.attest(MadeUpTdx()).kind is EvidenceKind.TDX
    record = last_record(site.attestor.state)
    assert (record["tcb_status"], record["tcb_eval_data_number"]) == ("UpToDate", 17)
    assert (record["collateral_issued_at"], record["collateral_expires_at"]) == (NOW - DAY, NOW + 30 * DAY)


def test_collateral_may_come_with_the_evidence(site: Site) -> None:
    assert site.attest(MadeUpTdx(tuple(Collateral().parts()))).kind is EvidenceKind.TDX


def test_newer_collateral_of_the_attestor_is_not_replaced_by_the_workloads(site: Site) -> None:
    newer = Collateral(evaluation=18, status="OutOfDate").bundle()
    (site.folder / "endorsements" / "tdx" / "collateral.json").write_bytes(newer)
    older = MadeUpTdx((Collateral().bundle(),))
    assert site.refusal(older) == (EvidenceRefusedError, "tcb_status_not_allowed")


def test_a_quote_of_another_exchange(site: Site) -> None:
    replayed = MadeUpTdx((Collateral().bundle(),), fixed=b"r" * 64)
    assert site.refusal(replayed) == (EvidenceRefusedError, "report_data_mismatch")


def test_a_file_that_is_none_is_named_at_start_and_later(site: Site) -> None:
    folder = site.folder / "endorsements" / "tdx"
    (folder / "collateral.json").write_bytes(Collateral().bundle())
    (folder / "half.crl").write_bytes(b"0")
    with pytest.raises(ConfigurationError, match=r"tdx/half\.crl cannot be used"):
        build_attestor(site.settings)
    with pytest.raises(ConfigurationError, match=r"tdx/half\.crl cannot be used"):
        site.attest(MadeUpTdx())
    assert last_record(site.attestor.state)["reason"] == "configuration"
    (folder / "half.crl").unlink()
    assert site.attest(MadeUpTdx()).kind is EvidenceKind.TDX


@pytest.mark.parametrize("endorsements", [(b"x",) * (MAX_ENDORSEMENTS + 1), (b"x" * MAX_ENDORSEMENTS_BYTES, b"x")])
def test_endorsements_of_a_request_are_bounded(site: Site, endorsements: tuple[bytes, ...]) -> None:
    assert site.refusal(MadeUpTdx(endorsements))[0] is InvalidInputError


def test_settings_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path)
    with pytest.raises(ConfigurationError, match="is not there"):
        build_attestor(given.model_copy(update={"endorsements_dir": tmp_path / "nowhere"}))
    monkeypatch.setattr(verifiers, "_VERIFIERS", {})
    with pytest.raises(ConfigurationError, match="cannot verify evidence of kind tdx"):
        build_attestor(given)
