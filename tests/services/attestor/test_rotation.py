"""Rotation of the signing key while workloads attest and hold keys."""

from __future__ import annotations

import json

import grpc
import jwt
import pytest

from tensorguard.errors import EvidenceRefusedError, TokenError
from tensorguard.evidence.ear import key_id_of
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.keys import AttestorKey, KeySet
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2 as pb
from tensorguard.rpc.status import from_rpc_error
from tensorguard.store.signing_keys import LOOK_SECONDS, RETIRED_SECONDS

from .conftest import CONTENT_KEY, Bench, Clock
from .test_attest import attest, nonce_of, request

OVERLAP = 600


def rotate(bench: Bench) -> tuple[str, str]:
    """(old, new) thumbprints; the running attestor knows of it when this returns."""
    new = bench.attestor.state.rotate_signing_key(OVERLAP).thumbprint
    bench.clock.now += LOOK_SECONDS
    return bench.state.attestor_thumbprint, new


def served(bench: Bench) -> tuple[tuple[str, ...], str]:
    answer = bench.client()._stub.GetKeys(pb.GetKeysRequest(), timeout=5)
    return KeySet.from_jwks(answer.jwks).thumbprints, answer.thumbprint


def test_all_valid_keys_are_served_with_their_kid(bench: Bench, clock: Clock) -> None:
    old, new = rotate(bench)
    assert served(bench) == ((old, new), old)
    clock.now += OVERLAP
    assert served(bench) == ((old, new), new)
    answer = bench.client(f"{old},{new}")._stub.GetKeys(pb.GetKeysRequest(), timeout=5)
    assert [(key["kid"], key["alg"], key["use"]) for key in json.loads(answer.jwks)["keys"]] == [
        (old, "ES256", "sig"),
        (new, "ES256", "sig"),
    ]
    clock.now += RETIRED_SECONDS
    assert served(bench) == ((new,), new)


def test_a_workload_goes_on_through_the_rotation(bench: Bench, clock: Clock) -> None:
    old, new = rotate(bench)
    workload = bench.workload()
    workload.client = bench.client(f"{old}, {new}")
    first = workload.token()
    assert key_id_of(first) == old
    released = workload.release_key(bench.release, tokens_wanted=10)
    assert released.content_key == CONTENT_KEY
    while clock.now < released.terms.expires_at - 60:
        clock.now += 30
    workload.renew(released.terms.lease_id, tokens_used=1, tokens_wanted=10)
    clock.now += OVERLAP
    second = workload.token()
    assert key_id_of(second) == new
    assert workload.release_key(bench.release, tokens_wanted=10).content_key == CONTENT_KEY


def test_a_token_of_the_old_key_is_good_until_it_ends(bench: Bench, clock: Clock) -> None:
    old, new = rotate(bench)
    clock.now += OVERLAP - LOOK_SECONDS - 10
    workload = bench.workload()
    workload.client = bench.client(f"{old},{new}")
    token = workload.token()
    clock.now += 20
    assert served(bench)[1] == new and key_id_of(token) == old
    assert workload.token() == token
    assert workload.release_key(bench.release, tokens_wanted=10).content_key == CONTENT_KEY
    assert bench.client(f"{old},{new}").verifier().verify(token).attestor_thumbprint == old


def test_who_pins_only_the_old_key_is_told_to_add_the_new_one(bench: Bench, clock: Clock) -> None:
    _, new = rotate(bench)
    bench.workload().token()
    clock.now += OVERLAP
    with pytest.raises(TokenError, match=rf"{new}.*not pinned"):
        bench.workload().token()


def test_a_client_learns_the_new_key_while_it_is_announced(bench: Bench, clock: Clock) -> None:
    """A relying party that asked for the keys before the rotation verifies the first token of the new one."""
    bench_pins = bench.client()
    bench_pins._pins = []
    verifier = bench_pins.verifier()
    old, new = rotate(bench)
    clock.now += OVERLAP
    workload = bench.workload()
    workload.client = bench.client(f"{old},{new}")
    token = workload.token()
    with pytest.raises(TokenError):
        verifier.verify(token)
    assert bench_pins.verifier().verify(token).attestor_thumbprint == new


def test_keys_are_kept_while_the_attestor_is_away(bench: Bench, clock: Clock) -> None:
    workload = bench.workload()
    token = workload.token()
    bench.attestor.server.stop(0)
    clock.now += 120
    assert workload.client.verifier().verify(token)


def test_evidence_may_be_bound_to_any_valid_key_of_this_attestor(bench: Bench, clock: Clock) -> None:
    identity = WorkloadIdentity.generate()
    old, new = rotate(bench)

    def attest_for(thumbprint: str) -> str:
        bound = {"evidence_for": {"attestor_thumbprint": thumbprint}}
        return attest(bench, request(bench, identity, nonce_of(bench), attestor_thumbprint=thumbprint, **bound))

    for thumbprint in (old, new):
        assert key_id_of(attest_for(thumbprint)) == old
    with pytest.raises(EvidenceRefusedError):
        attest_for(AttestorKey.generate().thumbprint)
    assert json.loads(bench.audit_lines[-1])["detail"] == "attestor_key"
    message = request(bench, identity, nonce_of(bench), attestor_thumbprint=new)
    with pytest.raises(EvidenceRefusedError):
        attest(bench, message)
    assert json.loads(bench.audit_lines[-1])["detail"] == "report_data_mismatch"
    clock.now += OVERLAP + RETIRED_SECONDS
    with pytest.raises(EvidenceRefusedError):
        attest_for(old)


def test_a_token_of_a_retired_key_is_refused(bench: Bench, clock: Clock) -> None:
    """Whoever got hold of it later can sign nothing."""
    retired = bench.attestor.state.key
    old, new = rotate(bench)
    clock.now += OVERLAP + RETIRED_SECONDS
    workload = bench.workload()
    workload.client = bench.client(f"{old},{new}")
    workload.token()
    payload = jwt.decode(workload.token(), options={"verify_signature": False})
    forged = jwt.encode(
        payload, retired.private_key, algorithm="ES256", headers={"typ": "JWT", "kid": retired.thumbprint}
    )
    with pytest.raises(TokenError, match="not the expected attestor's"):
        workload.client.verifier().verify(forged)
    try:
        workload.client._stub.ReleaseKey(
            pb.ReleaseKeyRequest(
                token=forged,
                manifest_digest=bytes(32),
                package_id="package",
                sequence=1,
                tokens_wanted=1,
                request_nonce=bytes(32),
            ),
            timeout=5,
        )
    except grpc.RpcError as error:
        assert isinstance(from_rpc_error(error), TokenError)
    else:
        pytest.fail("a key was released")
