"""A machine is revoked by the id that its evidence has: through the whole attestor, for each maker's id."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import RevokedError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.release import Release, RevocationNotice
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.snp.verifier import SnpVerifier
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tensorguard.evidence.workload import Workload
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.audit import last_record
from tests.support.policies import snp_policy, tdx_policy
from tests.support.revocations import SECONDS, first_notice, revoke_now
from tests.support.synthetic_pki import snp, tdx

PKI = tdx.Pki()
REGISTERS = {"mrtd": tdx.MRTD.hex(), "rtmr0": "20" * 48, "rtmr1": "21" * 48, "rtmr2": "22" * 48}


@dataclass(frozen=True)
class TdxMachine:
    """A trust domain on the machine with this PPID."""

    ppid: bytes
    kind: EvidenceKind = EvidenceKind.TDX

    @property
    def chip(self) -> str:
        return self.ppid.hex()

    def collect(self, binding: Binding, role: Role) -> Evidence:
        pki = tdx.with_machine(PKI, ppid=self.ppid)
        quote = tdx.Quote(pki=pki, report_data=binding.report_data)
        return Evidence(quote.encode(), (tdx.Collateral(pki=pki).bundle(),))


@dataclass(frozen=True)
class SnpMachine:
    """A guest on the chip with this id."""

    chip_id: bytes
    kind: EvidenceKind = EvidenceKind.SNP

    @property
    def chip(self) -> str:
        return self.chip_id.hex()

    def collect(self, binding: Binding, role: Role) -> Evidence:
        chip = snp.chip(amd={"4": self.chip_id})
        return Evidence(chip.report(report_data=binding.report_data, chip_id=self.chip_id), tuple(chip.endorsements))


Machine = TdxMachine | SnpMachine


@dataclass
class Site:
    """An attestor, the machine to revoke and another one like it."""

    folder: Path
    attestor: Attestor
    now: float
    machine: Machine
    other: Machine
    release: Release
    clients: list[AttestorClient] = field(default_factory=list)

    def workload(self, machine: Machine) -> Workload:
        self.clients.append(AttestorClient(self.attestor.server.address, clock=lambda: self.now))
        return Workload(
            self.clients[-1],
            WorkloadIdentity.generate(),
            machine,
            role=Role.COPROCESSOR,
            tenant="tenant",
            package_id="package",
            clock=lambda: self.now,
        )


@contextmanager
def running(folder: Path, policy: dict[str, Any], now: float, machine: Machine, other: Machine) -> Iterator[Site]:
    (folder / "policy.json").write_text(json.dumps(policy))
    settings = AttestorSettings(
        state_dir=folder / "state", policy_file=folder / "policy.json", listen="127.0.0.1:0", _cli_parse_args=[]
    )
    attestor = build_attestor(settings, clock=lambda: now)
    attestor.server.start()
    release = Release("tenant", "package", 1, os.urandom(32))
    digest, key_id = release.manifest_digest.hex(), os.urandom(16).hex()
    attestor.state.packages.register(digest, "tenant", "package", 1, key_id, os.urandom(32), 1000, int(now) + 5000)
    site = Site(folder, attestor, now, machine, other, release)
    try:
        yield site
    finally:
        for client in site.clients:
            client.close()
        attestor.server.stop(0)
        attestor.close()


@pytest.fixture(params=["tdx", "snp"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    tdx_verifier, snp_verifier = TdxVerifier((PKI.root_fingerprint,)), SnpVerifier(snp.chip().roots)
    monkeypatch.setattr("tensorguard.evidence.tdx.verifier.TdxVerifier", lambda: tdx_verifier)
    monkeypatch.setattr("tensorguard.evidence.snp.verifier.SnpVerifier", lambda: snp_verifier)
    if request.param == "tdx":
        machines: tuple[Machine, Machine] = TdxMachine(b"\x0a" * 16), TdxMachine(b"\x0b" * 16)
        made = running(tmp_path, tdx_policy(REGISTERS), tdx.NOW, *machines)
    else:
        machines = SnpMachine(b"\x0a" * 64), SnpMachine(b"\x0b" * 64)
        made = running(tmp_path, snp_policy({"measurement": "6d" * 48}), snp.AT, *machines)
    with made as running_site:
        yield running_site


def test_a_revoked_chip_is_pushed_and_refused_and_its_neighbour_is_not(site: Site) -> None:
    holder, neighbour = site.workload(site.machine), site.workload(site.other)
    lease = holder.release_key(site.release, tokens_wanted=10).terms
    neighbours = neighbour.release_key(site.release, tokens_wanted=10).terms
    told = first_notice(neighbour)
    revoke_now(site.folder / "state", Subject(RevocationKind.CHIP, value=site.machine.chip))
    assert told.get(timeout=SECONDS) == RevocationNotice(1, workloads=(holder.identity.public.thumbprint,))

    for event, attempt in (
        ("release", lambda: holder.release_key(site.release, tokens_wanted=1)),
        ("renew", lambda: holder.renew(lease.lease_id, tokens_used=1, tokens_wanted=1)),
        ("attest", lambda: site.workload(site.machine).token()),
    ):
        with pytest.raises(RevokedError, match="this chip was revoked"):
            attempt()
        record = last_record(site.attestor.state)
        assert (record["event"], record["reason"], record["detail"]) == (event, "revoked", "chip_revoked")
    with pytest.raises(RevokedError, match="this chip was revoked"):
        next(holder.watch_revocations(0))

    assert neighbour.renew(neighbours.lease_id, tokens_used=1, tokens_wanted=1).tokens_granted == 11
    assert site.workload(site.other).token()
