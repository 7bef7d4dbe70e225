"""Attacks on the challenge-response, over gRPC."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
import yaml

from tensorguard.errors import (
    EvidenceRefusedError,
    InternalError,
    InvalidInputError,
    NonceError,
    PolicyError,
    TenSafeError,
    TokenError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.report_data import binding
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.audit import AuditLog
from tensorguard.store.audit_head import HeadKeeper

from .conftest import CODE, Bench


def stub(bench: Bench) -> attestor_pb2_grpc.AttestorServiceStub:
    return bench.client()._stub


def request(bench: Bench, identity: WorkloadIdentity, nonce: bytes, **changes: Any) -> pb.AttestRequest:
    """A correct request; `evidence_for` changes what the evidence is bound to, the rest what is sent."""
    bound: dict[str, Any] = {
        "attestor_thumbprint": bench.state.attestor_thumbprint,
        "tenant": "tenant",
        "role": Role.COPROCESSOR,
        "package_id": "package",
        **changes.pop("evidence_for", {}),
    }
    bound_to = binding(bound.pop("nonce", nonce), bound.pop("identity", identity.public), **bound)
    platform = changes.pop("platform", bench.platform())
    return pb.AttestRequest(
        **{
            "nonce": nonce,
            "evidence_kind": "simulated",
            "evidence": platform.collect(bound_to, bound["role"]).evidence,
            "signing_key": identity.public.signing_key,
            "hpke_key": identity.public.hpke_key,
            "tenant": "tenant",
            "role": pb.ROLE_COPROCESSOR,
            "package_id": "package",
            **changes,
        }
    )


def attest(bench: Bench, message: pb.AttestRequest) -> str:
    try:
        return stub(bench).Attest(message, timeout=5).token
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def nonce_of(bench: Bench) -> bytes:
    return stub(bench).CreateNonce(pb.CreateNonceRequest()).nonce


def decisions(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.audit_lines]


@pytest.fixture
def identity() -> WorkloadIdentity:
    return WorkloadIdentity.generate()


def test_accepted(bench: Bench, identity: WorkloadIdentity) -> None:
    token = bench.client().attest(
        identity,
        bench.platform(),
        role=Role.COPROCESSOR,
        tenant="tenant",
        package_id="package",
        tls_key=b"spki",
    )
    result = bench.client().verifier().verify(token)
    assert result.identity == identity.public
    assert result.tls_key_sha256 != ""
    last = decisions(bench)[-1]
    assert (last["event"], last["decision"], last["jti"]) == ("attest", "accepted", result.token_id)


def test_replayed_nonce(bench: Bench, identity: WorkloadIdentity) -> None:
    message = request(bench, identity, nonce_of(bench))
    attest(bench, message)
    with pytest.raises(NonceError):
        attest(bench, message)


@pytest.mark.parametrize("nonce", [b"\x00" * 32, b"", b"\x00" * 31, b"\x00" * 100])
def test_foreign_nonce(bench: Bench, identity: WorkloadIdentity, nonce: bytes) -> None:
    with pytest.raises(NonceError):
        attest(bench, request(bench, identity, nonce))


def test_expired_nonce(bench: Bench, identity: WorkloadIdentity) -> None:
    nonce = nonce_of(bench)
    bench.clock.now += 60
    with pytest.raises(NonceError, match="expired"):
        attest(bench, request(bench, identity, nonce))


def test_nonce_is_spent_on_bad_evidence(bench: Bench, identity: WorkloadIdentity) -> None:
    nonce = nonce_of(bench)
    with pytest.raises(EvidenceRefusedError):
        attest(bench, request(bench, identity, nonce, evidence=b"x" * 100))
    with pytest.raises(NonceError):
        attest(bench, request(bench, identity, nonce))


def test_a_restart_between_challenge_and_answer_is_not_noticed(bench: Bench, identity: WorkloadIdentity) -> None:
    message = request(bench, identity, nonce_of(bench))
    bench.restart()
    attest(bench, message)
    bench.restart()
    with pytest.raises(NonceError):
        attest(bench, message)


OTHER = WorkloadIdentity.generate()


@pytest.mark.parametrize(
    "sent",
    [
        {"hpke_key": OTHER.public.hpke_key},
        {"signing_key": OTHER.public.signing_key},
        {"tls_key": b"tls"},
        {"tenant": "other-tenant"},
        {"role": pb.ROLE_INFERENCE},
        {"package_id": "another"},
        {"package_id": ""},
    ],
)
def test_evidence_is_bound_to_everything_sent(bench: Bench, identity: WorkloadIdentity, sent: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefusedError):
        attest(bench, request(bench, identity, nonce_of(bench), **sent))
    assert decisions(bench)[-1]["detail"] == "report_data_mismatch"


@pytest.mark.parametrize("bound", [{"attestor_thumbprint": "another"}, {"nonce": b"\x01" * 32}])
def test_evidence_is_bound_to_this_exchange(bench: Bench, identity: WorkloadIdentity, bound: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefusedError):
        attest(bench, request(bench, identity, nonce_of(bench), evidence_for=bound))
    assert decisions(bench)[-1]["detail"] == "report_data_mismatch"


@pytest.mark.parametrize(
    ("detail", "sent"),
    [
        ("evidence_kind_not_allowed", {"evidence_kind": "tdx"}),
        ("evidence_kind_not_allowed", {"evidence_kind": "MOCK"}),
        ("evidence_kind_not_allowed", {"evidence_kind": ""}),
        ("tenant_not_allowed", {"tenant": "stranger"}),
        ("signature", {"evidence": b"MOCK" * 50}),
    ],
)
def test_refused(bench: Bench, identity: WorkloadIdentity, detail: str, sent: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefusedError):
        attest(bench, request(bench, identity, nonce_of(bench), **sent))
    last = decisions(bench)[-1]
    assert (last["decision"], last["detail"]) == ("refused", detail)


@pytest.mark.parametrize(
    "sent",
    [
        {"signing_key": b"\x04" + b"\x01" * 64},
        {"hpke_key": b""},
        {"evidence": b""},
        {"evidence": b"x" * 70_000},
        {"tenant": "../../etc"},
        {"tenant": ""},
        {"package_id": "x" * 1000},
        {"role": pb.ROLE_UNSPECIFIED},
        {"role": 99},
        {"tls_key": b"x" * 2000},
    ],
)
def test_malformed(bench: Bench, identity: WorkloadIdentity, sent: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        attest(bench, request(bench, identity, nonce_of(bench), **sent))


def platforms(bench: Bench, tmp: Any) -> dict[str, SimulatedPlatform]:
    other = initialise_development_state(tmp / "other", "tenant", measurement=CODE)
    return {
        "signature": SimulatedPlatform(other.simulated_root_key, measurement=CODE, clock=bench.clock),
        "measurement_not_allowed": bench.platform("cd" * 48),
        "debug_enabled": bench.platform(debug=True),
        "evidence_time": SimulatedPlatform(
            bench.state.simulated_root_key, measurement=CODE, clock=lambda: bench.clock() - 400
        ),
    }


@pytest.mark.parametrize("detail", ["signature", "measurement_not_allowed", "debug_enabled", "evidence_time"])
def test_platforms_refused(bench: Bench, identity: WorkloadIdentity, tmp_path: Any, detail: str) -> None:
    platform = platforms(bench, tmp_path)[detail]
    with pytest.raises(EvidenceRefusedError):
        bench.client().attest(identity, platform, role=Role.COPROCESSOR, tenant="tenant", package_id="package")
    assert decisions(bench)[-1]["detail"] == detail


def test_policy_without_simulated_refuses(bench: Bench, identity: WorkloadIdentity) -> None:
    """A policy for hardware only: the attestor does not start, as it could verify nothing it names."""
    document = yaml.safe_load(bench.state.policy_file.read_text())
    document["evidence_kinds"] = ["tdx"]
    for rules in document["roles"].values():
        rules["measurements"] = [{"evidence_kind": "tdx", "values": {"mrtd": "11" * 48}}]
    bench.state.policy_file.write_text(yaml.safe_dump(document))
    with pytest.raises(TenSafeError, match="tdx"):
        bench.restart()


def test_policy_with_nothing_allowed_does_not_start(bench: Bench) -> None:
    document = yaml.safe_load(bench.state.policy_file.read_text())
    document["evidence_kinds"] = []
    bench.state.policy_file.write_text(yaml.safe_dump(document))
    with pytest.raises(PolicyError):
        bench.restart()


def test_no_token_without_an_audit_record(
    bench: Bench, identity: WorkloadIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: AuditLog, connection: object, event: str, fields: object) -> None:
        raise InternalError("disk full")

    message = request(bench, identity, nonce_of(bench))
    monkeypatch.setattr(AuditLog, "_append", broken)
    with pytest.raises(InternalError):
        attest(bench, message)


def test_a_record_is_written_before_its_token_is_answered(
    bench: Bench, identity: WorkloadIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attestor dies between record and answer: the record is there, the token is not."""

    def dies(self: HeadKeeper, *_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    message = request(bench, identity, nonce_of(bench))
    monkeypatch.setattr(HeadKeeper, "keep", dies)
    with pytest.raises(InternalError):
        attest(bench, message)
    monkeypatch.undo()
    assert [item["decision"] for item in decisions(bench) if item["event"] == "attest"] == ["accepted", "failed"]
    bench.restart()


def test_pinned_key(bench: Bench, identity: WorkloadIdentity) -> None:
    client = bench.client(thumbprint=AttestorKey.generate().thumbprint)
    with pytest.raises(TokenError, match="pinned"):
        client.attest(identity, bench.platform(), role=Role.COPROCESSOR, tenant="tenant")


def test_a_pin_keeps_other_keys_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A man in the middle adds his own key to the key set: tokens of his are refused."""
    mine = AttestorKey.generate()
    theirs = json.loads(bench.client().jwks().to_jwks())
    both = json.dumps({"keys": [*theirs["keys"], *json.loads(mine.key_set().to_jwks())["keys"]]})
    client = bench.client()
    answer = pb.GetKeysResponse(jwks=both.encode(), thumbprint=bench.state.attestor_thumbprint)
    monkeypatch.setattr(client._stub, "GetKeys", lambda *_, **__: answer)
    assert client.jwks().thumbprints == (bench.state.attestor_thumbprint,)
    assert client.attestor_thumbprint == bench.state.attestor_thumbprint
    answer.thumbprint = mine.thumbprint
    client = bench.client()
    monkeypatch.setattr(client._stub, "GetKeys", lambda *_, **__: answer)
    with pytest.raises(TokenError, match="not pinned"):
        client.jwks()


def test_a_token_for_other_keys_is_not_taken(
    bench: Bench, identity: WorkloadIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    stolen = bench.workload().token()
    client = bench.client()
    monkeypatch.setattr(client._stub, "Attest", lambda *_, **__: pb.AttestResponse(token=stolen))
    with pytest.raises(TokenError, match="other keys"):
        client.attest(identity, bench.platform(), role=Role.COPROCESSOR, tenant="tenant", package_id="package")


def test_unreachable_attestor_is_named() -> None:
    client = AttestorClient("127.0.0.1:1", timeout_seconds=0.5)
    with pytest.raises(TenSafeError, match=r"127\.0\.0\.1:1") as unreachable:
        client.jwks()
    assert unreachable.value.reason == "unavailable"
    client.close()


def test_status(bench: Bench) -> None:
    status = bench.client().status()
    assert list(status.evidence_kinds) == ["simulated"]
    assert status.audit_records == len(decisions(bench))
    assert status.audit_head == decisions(bench)[-1]["hash"]


def test_workload_attests_again_before_its_token_ends(bench: Bench) -> None:
    workload = bench.workload()
    first = workload.token()
    bench.clock.now += 239
    assert workload.token() == first
    bench.clock.now += 1
    assert workload.token() != first
