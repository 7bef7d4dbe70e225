"""What a policy asks of a host's GPUs, and what a token says about them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from typing import Any

import jwt
import pytest

from tensorguard.errors import EvidenceRefusedError, PolicyError
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.ear import MAX_TOKEN_BYTES, TokenVerifier, issue_token
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.nvidia.checks import appraise_gpus
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.nvidia.policy import GpuPolicy
from tensorguard.evidence.nvidia.verifier import MAX_GPUS, GpuVerifier
from tensorguard.evidence.policy import Policy, parse_policy
from tensorguard.evidence.report_data import gpu_nonce
from tests.support.synthetic_pki.certificates import NOW
from tests.support.synthetic_pki.nvidia import MODEL, NONCE, OPAQUE, Gpu, evidence

SECTION: dict[str, Any] = {
    "count": 1,
    "models": [MODEL],
    "driver_versions": ["590.12"],
    "vbios_versions": ["96.00.A5.00.01"],
    "devices": "any",
}
GPU = Gpu.create()
DEVICE_ID = GPU.device_id


def policy(role: str = "inference", **changes: Any) -> Policy:
    section = {name: value for name, value in {**SECTION, **changes}.items() if value is not ...}
    rules = {"measurements": [{"evidence_kind": "simulated", "values": {"code": "ab" * 48}}], "gpu": section}
    document = {
        "version": 1,
        "id": "gpus",
        "evidence_kinds": ["simulated"],
        "tenants": ["tenant"],
        "roles": {role: rules},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
    }
    return parse_policy(json.dumps(document))


def section(**changes: Any) -> GpuPolicy:
    found = policy(**changes).roles[Role.INFERENCE].gpu
    assert found is not None
    return found


def appraise(*devices: dict[str, str], nonce: bytes = NONCE, **changes: Any) -> tuple[GpuClaims, ...]:
    data = evidence(*devices) if devices else b""
    return appraise_gpus(section(**changes), data, nonce, GpuVerifier([GPU.root]), at=NOW)


def reason(*devices: dict[str, str], **changes: Any) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        appraise(*devices, **changes)
    return refused.value.detail


def test_accepted() -> None:
    assert [gpu.device_id for gpu in appraise(GPU.device())] == [DEVICE_ID]
    appraise(GPU.device(), devices=[DEVICE_ID])
    appraise(GPU.device(), Gpu.create(GPU.chain[0]).device(), count=2)


def test_each_condition_has_its_own_reason() -> None:
    assert reason() == "gpu_evidence_missing"
    assert reason(GPU.device(), nonce=b"m" * 32) == "gpu_nonce_mismatch"
    assert reason(GPU.device(), count=2) == "gpu_count"
    assert reason(GPU.device(), Gpu.create(GPU.chain[0]).device()) == "gpu_count"
    assert reason(GPU.device(), models=["GB100 A01 GSP BROM"]) == "gpu_model_not_allowed"
    assert reason(GPU.device(), driver_versions=["590.13"]) == "gpu_driver_version_not_allowed"
    assert reason(GPU.device(), vbios_versions=["96.00.A5.00.02"]) == "gpu_vbios_version_not_allowed"
    assert reason(GPU.device(), devices=["ab"]) == "gpu_device_id_not_allowed"


def test_every_gpu_has_to_pass() -> None:
    other = Gpu.create(GPU.chain[0])
    old = other.device(other.report(opaque={**OPAQUE, 3: b"535.86.09\0"}))
    assert reason(GPU.device(), old, count=2) == "gpu_driver_version_not_allowed"
    replayed = other.device(other.report(b"o" * 32))
    assert reason(GPU.device(), replayed, count=2) == "gpu_nonce_mismatch"


def test_the_nonce_follows_from_the_report_data() -> None:
    fields = [b"tssp-gpu-nonce/v1", b"d" * 64]
    data = b"".join(struct.pack(">I", len(field)) + field for field in fields)
    assert gpu_nonce(b"d" * 64) == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        *({name: ...} for name in SECTION),
        *({name: []} for name in ("models", "driver_versions", "vbios_versions", "devices")),
        {"count": 0},
        {"count": MAX_GPUS + 1},
        {"count": "1"},
        {"driver_versions": ["590.*"]},
        {"vbios_versions": ["96.00.a5.00.01"]},
        {"devices": ["XY"]},
        {"devices": "all"},
        {"role": "coprocessor"},
    ],
    ids=str,
)
def test_a_section_says_what_it_means(changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="gpu"):
        policy(**changes)


def test_a_token_names_the_gpus() -> None:
    key, identity = AttestorKey.generate(), WorkloadIdentity.generate()
    (gpu,) = appraise(GPU.device())
    gpus = [dataclasses.replace(gpu, device_id=f"{number:040x}") for number in range(MAX_GPUS)]
    claims = Claims(EvidenceKind.SIMULATED, {"code": "ab" * 48}, b"d" * 64, None, False)

    def issue(found: list[GpuClaims]) -> str:
        return issue_token(
            key, policy(), claims, identity.public, tenant="tenant", role=Role.INFERENCE, gpus=found, now=NOW
        ).token

    text = issue(gpus)
    assert len(text) <= MAX_TOKEN_BYTES
    verifier = TokenVerifier(key.key_set(), clock=lambda: NOW)
    assert verifier.verify(text).gpu_ids == tuple(gpu.device_id for gpu in gpus)
    submodule = jwt.decode(text, options={"verify_signature": False})["submods"]["gpu"]
    assert submodule["tensafe_devices"][0] == {
        "device_id": "0" * 40,
        "model": MODEL,
        "driver_version": "590.12",
        "vbios_version": "96.00.A5.00.01",
    }
    assert submodule["ear_status"] == "warning"  # the host is simulated
    assert submodule["ear_trustworthiness_vector"] == {"instance-identity": 2, "executables": 0, "hardware": 2}
    assert verifier.verify(issue([])).gpu_ids == ()
    assert "gpu" not in jwt.decode(issue([]), options={"verify_signature": False})["submods"]
