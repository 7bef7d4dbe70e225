"""Hosts that do something wrong, against a real coprocessor with a real attestor."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from tensorguard.ckks import evaluator
from tensorguard.ckks.packing import pack, packed_bytes
from tensorguard.ckks.parallel import split
from tensorguard.ckks.plan import Plan
from tensorguard.errors import (
    AuthenticationError,
    EvidenceRefusedError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    TokenError,
    TokenExpiredError,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.workload import Workload
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.session import frames
from tests.support.coprocessor import ADAPTER, TENANT, World, running_attestor, running_world
from tests.support.raw_host import PARAMETERS, RawHost

SHAPE = (len(PARAMETERS.primes), PARAMETERS.degree)
PACKED = packed_bytes(*SHAPE)


def answered(response: object) -> bool:
    return isinstance(response, frames.EvaluationResponse)


# Opening a session


def test_honest_host_is_served(world: World) -> None:
    with RawHost(world).opened() as host:
        assert answered(host.evaluate(3))


def test_threads_of_the_settings_share_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(threads: int, count: int, work: Callable[[int, int], object]) -> None:
        seen.add(threads)
        split(threads, count, work)

    monkeypatch.setattr(evaluator, "split", watched)
    with running_world(tmp_path, threads=2) as world, RawHost(world).opened() as host:
        assert answered(host.evaluate(3))
    assert 2 in seen


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é"])
def test_no_token_no_session(world: World, token: str) -> None:
    with RawHost(world) as host, pytest.raises(TokenError):
        host.begin(host_token=token)


def test_coprocessors_token_is_not_a_hosts(world: World) -> None:
    with RawHost(world, world.workload(Role.COPROCESSOR, ADAPTER)) as host, pytest.raises(PermissionDeniedError):
        host.begin()


def test_stolen_token_opens_nothing(world: World) -> None:
    with RawHost(world) as thief:
        thief.begin(host_token=world.workload().token())
        with pytest.raises(AuthenticationError):
            thief.complete()
        with pytest.raises(NotFoundError):
            thief.attach()
        thief.stream()
        with pytest.raises(NotFoundError):
            thief.send(b"\x0a\x00")


def test_token_of_another_attestor(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    state = initialise_development_state(tmp_path_factory.mktemp("other") / "state", TENANT)
    with running_attestor(state) as address:
        foreign = Workload(
            AttestorClient(address, thumbprint=state.attestor_thumbprint),
            WorkloadIdentity.generate(),
            SimulatedPlatform(state.simulated_root_key),
            role=Role.INFERENCE,
            tenant=TENANT,
        )
        with RawHost(world, foreign) as host, pytest.raises(TokenError):
            host.begin()


def test_hardware_opens_nothing_for_a_host_that_simulates(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawHost(world) as host:
        host.begin()
        monkeypatch.setattr(world.coprocessor.servicer._workload, "evidence_kind", EvidenceKind.TDX)
        with pytest.raises(EvidenceRefusedError, match="run the host in a TEE"):
            host.begin()


def test_expired_token_opens_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawHost(world) as host:
        token, before = host.workload.token(), host.call("GetStatus", pb.GetStatusRequest()).sessions
        client = world.coprocessor.servicer._workload.client
        monkeypatch.setattr(client, "_clock", lambda: time.time() + 600)
        with pytest.raises(TokenExpiredError, match=r"expired \d+ s ago; attest again"):
            host.begin(host_token=token)
        assert host.call("GetStatus", pb.GetStatusRequest()).sessions == before


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tenant": "other"}, PermissionDeniedError),
        ({"tenant": ""}, PermissionDeniedError),
        ({"host_nonce": b"short"}, InvalidInputError),
        ({"host_nonce": bytes(33)}, InvalidInputError),
        ({"parameter_set": "n1024-q90"}, InvalidInputError),
    ],
)
def test_malformed_begin(world: World, changes: dict[str, Any], error: type[Exception]) -> None:
    with RawHost(world) as host, pytest.raises(error):
        host.begin(**changes)


def test_public_key_must_be_signed(world: World) -> None:
    with RawHost(world) as host:
        host.begin()
        for signature in (b"", b"x" * 70, b"x" * 100_000):
            with pytest.raises(AuthenticationError):
                host.complete(signature=signature)
        with pytest.raises(NotFoundError):
            host.attach()


def test_signature_binds_transcript_key_and_number(world: World) -> None:
    with RawHost(world) as host:
        transcript = host.begin()
        key = pack(np.zeros(SHAPE, np.uint32)).tobytes()
        other = pack(np.ones(SHAPE, np.uint32)).tobytes()
        swapped = type(transcript)(
            tenant=transcript.tenant,
            parameter_set=transcript.parameter_set,
            session_id=transcript.session_id,
            host_nonce=transcript.coprocessor_nonce,
            coprocessor_nonce=transcript.host_nonce,
            host_token=transcript.host_token,
            coprocessor_token=transcript.coprocessor_token,
        )
        for statement in (
            swapped.host_key_statement(0, key),
            transcript.host_key_statement(1, key),
            transcript.host_key_statement(0, other),
            transcript.coprocessor_statement(),
        ):
            with pytest.raises(AuthenticationError):
                host.complete(public_key=key, statement=statement)


@pytest.mark.parametrize("prime", [0, 1, 2])
def test_unreduced_public_key(world: World, prime: int) -> None:
    with RawHost(world) as host:
        host.begin()
        key = np.zeros(SHAPE, np.uint32)
        key[prime, 4095] = PARAMETERS.primes[prime]
        with pytest.raises(InvalidInputError, match="residue"):
            host.complete(public_key=pack(key).tobytes())


@pytest.mark.parametrize("length", [0, 4, PACKED - 4, PACKED + 4, 4 * SHAPE[0] * SHAPE[1]])
def test_public_key_of_another_length(world: World, length: int) -> None:
    with RawHost(world) as host:
        host.begin()
        with pytest.raises(InvalidInputError, match="bytes"):
            host.complete(public_key=bytes(length))


def test_key_numbers_only_grow(world: World) -> None:
    with RawHost(world) as host:
        host.begin()
        with pytest.raises(InvalidInputError, match="next key number"):
            host.complete(1)
        host.complete(0)
        with pytest.raises(InvalidInputError, match="next key number"):
            host.complete(0)
        host.complete(1)


def test_unknown_adapter(world: World) -> None:
    with RawHost(world) as host:
        host.begin()
        host.complete()
        with pytest.raises(NotFoundError):
            host.attach("nobody")


def test_basis_is_sealed_to_the_attested_key(world: World) -> None:
    with RawHost(world) as host:
        transcript = host.begin()
        host.complete()
        answer = host.attach()
        info = transcript.basis_info(ADAPTER, world.package.digest)
        assert len(host.workload.identity.open(answer.sealed_basis, info)) > 1000
        with pytest.raises(AuthenticationError):
            WorkloadIdentity.generate().open(answer.sealed_basis, info)
        with pytest.raises(AuthenticationError):
            host.workload.identity.open(answer.sealed_basis, transcript.basis_info("other", world.package.digest))


# The stream


def test_stream_needs_a_completed_session(world: World) -> None:
    with RawHost(world) as host:
        host.begin()
        for name in (b"", os.urandom(16)):
            host.stream(name)
            with pytest.raises(NotFoundError):
                host.send(b"\x0a\x00")
        host.stream()
        with pytest.raises(NotFoundError, match="no public key"):
            host.send(b"\x0a\x00")


def test_one_stream_per_session(world: World) -> None:
    with RawHost(world).opened() as host:
        assert answered(host.evaluate())
        first, outgoing = host.answers, host.outgoing
        host.stream(keep_previous=True)
        with pytest.raises(PermissionDeniedError):
            next_message(host)
        host.answers, host.outgoing = first, outgoing
        assert answered(host.evaluate())


def next_message(host: RawHost) -> bytes:
    try:
        message: bytes = next(host.answers)
        return message
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def test_session_ends_with_its_stream(world: World) -> None:
    with RawHost(world).opened() as host:
        assert answered(host.evaluate())
        host.outgoing.put(None)
        assert list(host.answers) == []
        host.stream()
        with pytest.raises(NotFoundError):
            host.send(frames.write_request(host.request()[0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_handle": 1},
        {"adapter_handle": 2**32 - 1},
        {"layer": 99},
        {"group": "down"},
        {"plan": Plan(1, 7, 3)},
        {"key_number": 1},
        {"tokens": 200},
    ],
    ids=str,
)
def test_unknown_things_get_the_one_failure(world: World, changes: dict[str, Any]) -> None:
    with RawHost(world).opened() as host:
        request = dataclasses.replace(host.request()[0], **changes)
        assert host.send(frames.write_request(request)) == frames.EvaluationFailure(host.request_id)
        assert answered(host.evaluate()), "the session lives on"


def test_unreduced_residues(world: World) -> None:
    with RawHost(world).opened() as host:
        request, _ = host.request()
        request.b[0, 1, 77] = PARAMETERS.primes[1]
        assert not answered(host.send(frames.write_request(request)))
        request, _ = host.request()
        request.b[0, 2, 0] = 2**30 - 1
        assert not answered(host.send(frames.write_request(request)))


def test_nothing_is_accepted_twice(world: World) -> None:
    with RawHost(world).opened() as host:
        request, _ = host.request()
        message = frames.write_request(request)
        assert answered(host.send(message))
        assert not answered(host.send(message)), "the same request id"
        again = frames.write_request(host.request(ids=request.ids, seeds=request.seeds, b=request.b)[0])
        assert not answered(host.send(again)), "the same ciphertext ids"
        host.request_id -= 1
        before = world_adapter(world).meter.total
        assert not answered(host.evaluate(50)), "the same request id with fresh ciphertexts"
        assert world_adapter(world).meter.total == before
        assert answered(host.evaluate())


def test_refused_requests_do_not_charge(world: World) -> None:
    adapter = world_adapter(world)
    with RawHost(world).opened() as host:
        before = adapter.meter.total
        assert not answered(host.evaluate(plan=Plan(1, 7, 3)))
        assert not answered(host.evaluate(layer=50))
        assert adapter.meter.total == before


def world_adapter(world: World) -> Any:
    return world.coprocessor.keepers[0]._adapter


@given(st.binary(max_size=300))
@settings(max_examples=25, deadline=None)
def test_garbage_ends_the_stream_with_a_typed_error(world: World, data: bytes) -> None:
    with RawHost(world, _garbage_workload(world)) as host:
        host.begin()
        host.complete()
        host.stream()
        with pytest.raises(InvalidInputError):
            host.send(data)


_WORKLOADS: dict[str, Any] = {}


def _garbage_workload(world: World) -> Any:
    """One attested identity for all examples."""
    return _WORKLOADS.setdefault(world.endpoint, world.workload())


def test_refused_frames_are_logged_once_for_each_reason(world: World) -> None:
    stream = io.StringIO()
    configure_logging("test", stream=stream)
    with RawHost(world).opened() as host:
        for _ in range(25):
            assert not answered(host.evaluate(layer=50))
            assert not answered(host.evaluate(plan=Plan(1, 7, 3)))
        assert answered(host.evaluate()), "the session lives on"

    def logged(event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == event]

    deadline = time.monotonic() + 10
    while not logged("evaluations refused in this session") and time.monotonic() < deadline:
        time.sleep(0.01)
    (total,) = logged("evaluations refused in this session")
    assert sum(total["requests"].values()) == 50
    lines = logged("evaluation refused")
    assert sorted(line["reason"] for line in lines) == sorted(total["requests"])


@pytest.mark.parametrize("cut", [41, 1000, 40_000])
def test_truncated_frame(world: World, cut: int) -> None:
    with RawHost(world).opened() as host:
        frame = pb.EvaluateRequest.FromString(frames.write_request(host.request()[0])).frame
        message = pb.EvaluateRequest(frame=frame[:cut]).SerializeToString()
        assert host.send(message) == frames.EvaluationFailure(host.request_id)


# What anyone may ask


def test_status_and_listing(world: World) -> None:
    with RawHost(world).opened() as host:
        assert answered(host.evaluate(2))
        status = host.call("GetStatus", pb.GetStatusRequest())
        assert status.evidence_kind == "simulated" and status.backend == "cpu" and status.sessions >= 1
        assert status.operations.products > 0 and status.operations.tokens > 0
        assert status.operations.rotations == status.operations.key_switches == 0
        assert status.operations.evaluation_key_bytes == 0
        assert status.operations.bytes_received > 40_000 and status.operations.bytes_sent > 15_000
        (adapter,) = host.call("ListAdapters", pb.ListAdaptersRequest()).adapters
        assert (adapter.name, adapter.tenant, adapter.sequence) == (ADAPTER, TENANT, 1)
        assert adapter.digest == world.package.digest and adapter.tokens_left > 0


def test_operations_of_a_stream_are_its_trailing_metadata(world: World) -> None:
    with RawHost(world).opened() as host:
        sent = [host.evaluate(tokens) for tokens in (1, 9)]
        assert not answered(host.evaluate(layer=50))
        host.outgoing.put(None)
        assert list(host.answers) == []
        trailing = dict(host.answers.trailing_metadata())
    for name in frames.OPERATIONS:
        expected = sum(getattr(response.counts, name) for response in sent if answered(response))
        assert trailing[f"tensafe-{name.replace('_', '-')}"] == str(expected)
    assert int(trailing["tensafe-products"]) > 0 and int(trailing["tensafe-ntt"]) > 0
    for name in ("rotations", "key-switches", "evaluation-key-bytes"):
        assert trailing[f"tensafe-{name}"] == "0"


def test_operations_are_metrics(world: World) -> None:
    def value(name: str) -> float:
        return REGISTRY.get_sample_value(f"{name}_total") or 0.0

    names = ("he_ntt_count", "he_product_count", "he_addition_count", "he_rerandomisation_count")
    before = {name: value(name) for name in (*names, "he_modulus_switch_count")}
    with RawHost(world).opened() as host:
        assert answered(host.evaluate(2))
    assert all(value(name) > count for name, count in before.items())
    for name in ("he_rotation_count", "he_key_switch_count", "he_evaluation_key_bytes"):
        assert REGISTRY.get_sample_value(f"{name}_total") == 0.0


def test_no_message_has_room_for_an_evaluation_key() -> None:
    fields = {
        f"{message.name}.{field.name}"
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    keys = {name for name in fields if "key" in name.lower()}
    counters = {"OperationCounts.key_switches", "OperationCounts.evaluation_key_bytes"}
    assert keys == counters | {"CompleteSessionRequest.key_number", "CompleteSessionRequest.public_key"}
