"""An SEV-SNP coprocessor attests through the kernel's interface, with the certificates that its host hands it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Platform
from tensorguard.evidence.result import AttestationResult
from tensorguard.evidence.snp.collector import SnpPlatform
from tensorguard.evidence.snp.verifier import SnpVerifier
from tests.support.audit import last_record
from tests.support.fake_tsm import FakeTsm
from tests.support.policies import snp_policy
from tests.support.synthetic_pki import snp

CHIP = snp.chip()
TABLE = snp.certificate_table(
    list(
        zip(
            (
                "63da758d-e664-4564-adc5-f4b93be8accd",
                "4ab7b379-bbac-4fe4-a02f-05aef327c782",
                "c0b406a4-a803-4952-9743-3fb6014cd0ae",
            ),
            CHIP.endorsements,
            strict=True,
        )
    )
)


@dataclass
class Guest(FakeTsm):
    """The kernel of a guest on `CHIP`."""

    fields: dict[str, Any] = field(default_factory=dict)

    def _answer(self, entry: Path, data: bytes) -> None:
        self.outblob = CHIP.report(**{"report_data": data, **self.fields})
        super()._answer(entry, data)


@dataclass
class Site:
    folder: Path
    attestor: Attestor
    guest: Guest

    def attest(self) -> AttestationResult:
        platform: Platform = SnpPlatform(self.guest.root)
        client = AttestorClient(self.attestor.server.address, clock=lambda: snp.AT)
        try:
            token = client.attest(
                WorkloadIdentity.generate(), platform, role=Role.COPROCESSOR, tenant="tenant", package_id="package"
            )
            return client.verifier().verify(token)
        finally:
            client.close()

    def refusal(self) -> str:
        """The reason that the audit log has."""
        with pytest.raises(EvidenceRefusedError):
            self.attest()
        return str(last_record(self.attestor.state)["detail"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made_up = SnpVerifier(CHIP.roots)
    monkeypatch.setattr("tensorguard.evidence.snp.verifier.SnpVerifier", lambda: made_up)
    guest = Guest(tmp_path / "tsm" / "report", provider="sev_guest\n", auxblob=TABLE)
    guest.install(monkeypatch)
    (tmp_path / "policy.json").write_text(json.dumps(snp_policy({"measurement": "6d" * 48}, require_crl=True)))
    (tmp_path / "endorsements" / "snp").mkdir(parents=True)
    (tmp_path / "endorsements" / "snp" / "milan.crl").write_bytes(CHIP.ark.revoke())
    settings = AttestorSettings(
        state_dir=tmp_path / "state",
        policy_file=tmp_path / "policy.json",
        listen="127.0.0.1:0",
        endorsements_dir=tmp_path / "endorsements",
    )
    attestor = build_attestor(settings, clock=lambda: snp.AT)
    attestor.server.start()
    yield Site(tmp_path, attestor, guest)
    attestor.server.stop(0)
    attestor.close()


def test_attested(site: Site) -> None:
    result = site.attest()
    assert (result.kind, result.simulated) == (EvidenceKind.SNP, False)
    record = last_record(site.attestor.state)
    assert (record["crl_number"], record["certificate_expires_at"]) == (7, (snp.START + snp.YEAR).timestamp())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"report_data": b"r" * 64}, "report_data_mismatch"),
        ({"policy": 0xB0000}, "debug_enabled"),
        ({"vmpl": 2}, "vmpl_not_allowed"),
        ({"measurement": b"x" * 48}, "measurement_not_allowed"),
    ],
)
def test_refused(site: Site, fields: dict[str, Any], reason: str) -> None:
    site.guest.fields = fields
    assert site.refusal() == reason


def test_a_chain_that_the_attestors_list_revokes(site: Site) -> None:
    site.attest()
    listed = CHIP.ark.revoke(CHIP.ask.certificate, number=8)
    (site.folder / "endorsements" / "snp" / "milan-8.crl").write_bytes(listed)
    assert site.refusal() == "revoked"
