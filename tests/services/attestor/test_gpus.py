"""GPUs of an inference host, over gRPC: what a policy asks, and what is bound to the exchange."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from services.attestor.appraiser import MAX_GPU_EVIDENCE_BYTES
from tensorguard.errors import EvidenceRefusedError, InvalidInputError, RevokedError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.nvidia.verifier import GpuVerifier
from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.result import AttestationResult
from tensorguard.evidence.workload import Workload
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.revocations import SECONDS, first_notice, revoke_now
from tests.support.synthetic_pki.certificates import issue
from tests.support.synthetic_pki.nvidia import MODEL, Gpu, evidence

from .conftest import Bench

ROOT = issue("NVIDIA Device Identity CA", days=(-9000, 9000))


class Gpus:
    """GPUs that answer a host's challenge, or another one."""

    def __init__(self, answer: Callable[[bytes], bytes] | None = None) -> None:
        self.gpu = Gpu.create(ROOT, days=(-9000, 9000))
        self.answer = answer or (lambda nonce: evidence(self.gpu.device(self.gpu.report(nonce))))

    def collect(self, nonce: bytes) -> bytes:
        return self.answer(nonce)


@pytest.fixture(autouse=True)
def asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy asks for a GPU, and the attestor trusts our root."""
    policy = yaml.safe_load(bench.state.policy_file.read_text())
    policy["roles"]["inference"]["gpu"] = {
        "count": 1,
        "models": [MODEL],
        "driver_versions": ["590.12"],
        "vbios_versions": ["96.00.A5.00.01"],
        "devices": "any",
    }
    bench.state.policy_file.write_text(yaml.safe_dump(policy))
    monkeypatch.setattr("services.attestor.appraiser.GpuVerifier", lambda: GpuVerifier([Gpu([ROOT]).root]))
    bench.restart()


def attest(bench: Bench, gpus: Gpus | None, role: Role = Role.INFERENCE) -> AttestationResult:
    client = bench.client()
    token = client.attest(WorkloadIdentity.generate(), bench.platform(), role=role, tenant="tenant", gpus=gpus)
    return client.verifier().verify(token)


def host_with(bench: Bench, gpus: Gpus) -> Workload:
    return Workload(
        bench.client(),
        WorkloadIdentity.generate(),
        bench.platform(),
        role=Role.INFERENCE,
        tenant="tenant",
        gpus=gpus,
        clock=bench.clock,
    )


def detail(bench: Bench) -> str:
    record = json.loads(bench.audit_lines[-1])
    found: str = record["detail"]
    return found


def test_a_token_names_them(bench: Bench) -> None:
    gpus = Gpus()
    assert attest(bench, gpus).gpu_ids == (gpus.gpu.device_id,)
    record = json.loads(bench.audit_lines[-1])
    assert len(record["gpu_evidence_sha256"]) == 64


def test_a_host_without_is_refused(bench: Bench) -> None:
    with pytest.raises(EvidenceRefusedError):
        attest(bench, None)
    assert detail(bench) == "gpu_evidence_missing"


def test_evidence_of_another_exchange_is_refused(bench: Bench) -> None:
    first = Gpus()
    kept: list[bytes] = []

    def record(nonce: bytes) -> bytes:
        kept.append(evidence(first.gpu.device(first.gpu.report(nonce))))
        return kept[0]

    replaying = Gpus(record)
    attest(bench, replaying)
    with pytest.raises(EvidenceRefusedError):
        attest(bench, replaying)
    assert detail(bench) == "gpu_nonce_mismatch"


def test_a_revoked_gpu(bench: Bench) -> None:
    """As `tensafe revoke chip` names it; the host's other GPUs and other hosts are not concerned."""
    gpus, others = Gpus(), Gpus()
    host, other = host_with(bench, gpus), host_with(bench, others)
    host.token()
    told = first_notice(other)
    revoke_now(bench.state.state_dir, Subject(RevocationKind.CHIP, value=gpus.gpu.device_id))
    assert told.get(timeout=SECONDS) == RevocationNotice(1, workloads=(host.identity.public.thumbprint,))
    with pytest.raises(RevokedError, match="this chip was revoked"):
        attest(bench, gpus)
    assert detail(bench) == "chip_revoked"
    with pytest.raises(RevokedError):
        next(host.watch_revocations(0))
    attest(bench, others)


def test_other_roles_are_not_asked(bench: Bench) -> None:
    assert attest(bench, Gpus(lambda nonce: b"nonsense"), Role.COPROCESSOR).gpu_ids == ()


def test_too_much(bench: Bench) -> None:
    with pytest.raises(InvalidInputError):
        attest(bench, Gpus(lambda nonce: bytes(MAX_GPU_EVIDENCE_BYTES + 1)))
