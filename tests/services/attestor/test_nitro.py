"""A coprocessor in a Nitro enclave attests through its security module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.nitro.collector import NitroPlatform
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tensorguard.evidence.result import AttestationResult
from tests.evidence.nitro.test_checks import nitro_policy
from tests.support.audit import last_record
from tests.support.fake_nsm import FakeModule
from tests.support.synthetic_pki.certificates import NOW
from tests.support.synthetic_pki.nitro import PCRS

IDENTITY = WorkloadIdentity.generate()


@pytest.fixture
def module() -> FakeModule:
    return FakeModule()


@pytest.fixture
def attestor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: FakeModule) -> Iterator[Attestor]:
    made_up = NitroVerifier([module.module.root])
    monkeypatch.setattr("tensorguard.evidence.nitro.verifier.NitroVerifier", lambda: made_up)
    # The policy itself requires less than a key does.
    policy = nitro_policy(required_claims=["nonce"])
    (tmp_path / "policy.json").write_text(policy.model_dump_json(exclude_none=True))
    settings = AttestorSettings(
        state_dir=tmp_path / "state", policy_file=tmp_path / "policy.json", listen="127.0.0.1:0"
    )
    made = build_attestor(settings, clock=lambda: NOW)
    made.server.start()
    yield made
    made.server.stop(0)
    made.close()


def attest(attestor: Attestor, transact: Callable[[bytes], bytes]) -> AttestationResult:
    client = AttestorClient(attestor.server.address, clock=lambda: NOW)
    try:
        token = client.attest(IDENTITY, NitroPlatform(transact), role=Role.COPROCESSOR, tenant="tenant")
        return client.verifier().verify(token)
    finally:
        client.close()


def refusal(attestor: Attestor, transact: Callable[[bytes], bytes]) -> str:
    with pytest.raises(EvidenceRefusedError):
        attest(attestor, transact)
    return str(last_record(attestor.state)["detail"])


def test_attested(attestor: Attestor, module: FakeModule) -> None:
    result = attest(attestor, module)
    assert (result.kind, result.simulated, result.identity) == (EvidenceKind.NITRO, False, IDENTITY.public)
    fields = module.requests[-1]["Attestation"]
    assert [len(fields[name]) for name in ("user_data", "nonce", "public_key")] == [64, 32, 91]


def test_a_document_of_an_earlier_exchange(attestor: Attestor, module: FakeModule) -> None:
    """For the same workload, in time and never shown before."""
    kept: list[bytes] = []

    def replay(request: bytes) -> bytes:
        kept.append(module(request))
        return kept[0]

    attest(attestor, replay)
    assert refusal(attestor, replay) == "nonce_mismatch"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"nonce": None}, "nonce_missing"),
        ({"public_key": None}, "public_key_missing"),
        ({"user_data": None}, "user_data_missing"),
        ({"public_key": WorkloadIdentity.generate().public.signing_key_spki}, "public_key_mismatch"),
        ({"user_data": b"u" * 64}, "report_data_mismatch"),
        ({"pcrs": dict.fromkeys(range(16), bytes(48))}, "debug_enabled"),
        ({"pcrs": {**PCRS, 0: b"x" * 48}}, "measurement_not_allowed"),
        ({"timestamp": int((NOW - 301) * 1000)}, "evidence_time"),
        ({"digest": "SHA512"}, "malformed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(attestor: Attestor, module: FakeModule, fields: dict[str, Any], reason: str) -> None:
    module.fields = fields
    assert refusal(attestor, module) == reason


def test_another_makers_module(attestor: Attestor) -> None:
    assert refusal(attestor, FakeModule()) == "root_not_trusted"
