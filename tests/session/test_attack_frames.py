"""Crafted ciphertexts and frames from an admitted host, over gRPC: refused in the one way there is, or harmless."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tensorguard.ckks.plan import Plan
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames
from tests.support.coprocessor import ADAPTER, World
from tests.support.raw_host import PARAMETERS, RawHost

Request = frames.EvaluationRequest


@pytest.fixture
def host(world: World) -> Iterator[RawHost]:
    with RawHost(world).opened() as opened:
        yield opened
        assert isinstance(opened.evaluate(), frames.EvaluationResponse), "an honest request is answered afterwards"


def residue_at_prime(request: Request) -> Request:
    b = request.b.copy()
    b[-1, 0, -1] = PARAMETERS.primes[0]
    return dataclasses.replace(request, b=b)


def one_ciphertext_less(request: Request) -> Request:
    return dataclasses.replace(request, ids=request.ids[:-1], seeds=request.seeds[:-32], b=request.b[:-1])


def one_ciphertext_more(request: Request) -> Request:
    ids = np.append(request.ids, request.ids[-1] + np.uint64(1000))
    return dataclasses.replace(
        request, ids=ids, seeds=request.seeds + bytes(32), b=np.append(request.b, request.b[:1], 0)
    )


def repeated_id(request: Request) -> Request:
    ids = request.ids.copy()
    ids[1] = ids[0]
    return dataclasses.replace(request, ids=ids)


def falling_ids(request: Request) -> Request:
    return dataclasses.replace(request, ids=request.ids[::-1].copy())


def id_zero(request: Request) -> Request:
    ids = request.ids.copy()
    ids[0] = 0
    return dataclasses.replace(request, ids=ids)


def unknown_plan(request: Request) -> Request:
    return dataclasses.replace(request, plan=Plan(1, 24, 5))


def more_tokens_than_sent(request: Request) -> Request:
    return dataclasses.replace(request, tokens=request.tokens + request.plan.tokens)


def fewer_tokens_than_sent(request: Request) -> Request:
    return dataclasses.replace(request, tokens=request.tokens - request.plan.tokens)


CRAFTED: list[Callable[[Request], Request]] = [
    residue_at_prime,
    one_ciphertext_less,
    one_ciphertext_more,
    repeated_id,
    falling_ids,
    id_zero,
    unknown_plan,
    more_tokens_than_sent,
    fewer_tokens_than_sent,
]


@pytest.mark.parametrize("craft", CRAFTED, ids=lambda craft: craft.__name__)
def test_crafted_requests_get_the_one_failure(host: RawHost, craft: Callable[[Request], Request]) -> None:
    request = host.request(3 * host.request()[0].plan.tokens)[0]
    assert len(request.ids) == 3, "one ciphertext for each chunk of tokens"
    assert host.send(frames.write_request(craft(request))) == frames.EvaluationFailure(request.request_id)


def test_ids_never_go_back(host: RawHost) -> None:
    early = host.request()[0]
    assert isinstance(host.evaluate(), frames.EvaluationResponse)
    late = dataclasses.replace(early, request_id=host.request_id + 1)
    host.request_id += 1
    assert host.send(frames.write_request(late)) == frames.EvaluationFailure(late.request_id)


def test_a_plan_with_too_many_outputs_cannot_be_asked_for(host: RawHost) -> None:
    """256 wanted coefficients would show a malformed public key's mask. No such plan can be made: patch the bytes."""
    request = host.request()[0]
    frame = bytearray(pb.EvaluateRequest.FromString(frames.write_request(request)).frame)
    frame[6:12] = np.array([1, 16, 256], "<u2").tobytes()
    message = pb.EvaluateRequest(frame=bytes(frame)).SerializeToString()
    assert host.send(message) == frames.EvaluationFailure(request.request_id)


def test_another_groups_plan_gives_that_groups_rows_or_nothing(world: World, host: RawHost) -> None:
    """Only the asked group's own plans are evaluated: the request's plan has no say in what is computed."""
    qkv, o = (next(g for g in world.package.manifest.moai.groups if (g.layer, g.group) == (0, n)) for n in ("qkv", "o"))
    for identifier in set(o.plans) - set(qkv.plans):
        request = dataclasses.replace(host.request()[0], plan=Plan.parse(identifier))
        assert host.send(frames.write_request(request)) == frames.EvaluationFailure(request.request_id)
    for identifier in set(qkv.plans) - set(o.plans):
        request = dataclasses.replace(host.request()[0], plan=Plan.parse(identifier), group="o")
        assert host.send(frames.write_request(request)) == frames.EvaluationFailure(request.request_id)
    assert set(o.plans) != set(qkv.plans)


def test_a_ciphertext_of_nothing_shows_nothing(host: RawHost) -> None:
    """b = 0 is a valid message of -a·s: garbage for whoever asks, charged like any other request, and all of c1 is
    covered by the encryption of zero.
    """
    request = host.request()[0]
    empty = dataclasses.replace(request, b=np.zeros_like(request.b))
    adapter = host.world.coprocessor.servicer._store.get(ADAPTER)
    seen = adapter.meter._seen[0, "qkv"]
    first = host.send(frames.write_request(empty))
    assert isinstance(first, frames.EvaluationResponse) and adapter.meter._seen[0, "qkv"] == seen + 1
    again = host.send(frames.write_request(dataclasses.replace(host.request()[0], b=np.zeros_like(request.b))))
    assert isinstance(again, frames.EvaluationResponse)
    # c0 of a zero ciphertext is pk0·u + f: nothing of the weights, and never the same.
    assert not np.array_equal(first.c0, again.c0) and (first.c1 != again.c1).mean() > 0.99


def test_random_residues_are_harmless(host: RawHost) -> None:
    """What a host may send without a key behind it is answered and charged; nothing crashes on it."""
    request = host.request(2)[0]
    generator = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    for i, prime in enumerate(PARAMETERS.primes):
        request.b[:, i] = generator.integers(0, prime, request.b[:, i].shape, np.uint32)
    answer = host.send(frames.write_request(request))
    assert isinstance(answer, frames.EvaluationResponse) and answer.c0.max() < PARAMETERS.primes[0]
