"""Sessions behind a real coprocessor in this process, with either engine. The host is the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from services.he_lora.server import build_coprocessor
from services.he_lora.settings import load_settings
from tensorguard.ckks import Plan
from tensorguard.engines import Engine
from tensorguard.errors import ConfigurationError, InvalidInputError
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames
from tests.session.test_client import activations, check_delta, session_with
from tests.support.coprocessor import World, running_world
from tests.support.raw_host import PARAMETERS, RawHost


@pytest.fixture(scope="module")
def world(engine: Engine[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp(engine.name), backend=engine.name) as running:
        yield running


@pytest.mark.parametrize(("tokens", "group"), [(1, "qkv"), (3, "o"), (40, "qkv")])
def test_deltas_are_the_plaintext_ones(world: World, tokens: int, group: str) -> None:
    with session_with(world) as session:
        check_delta(world, session, activations(tokens), 1, group)


def test_keys_rotate(world: World) -> None:
    with session_with(world, tokens_per_key=4) as session:
        for _ in range(4):
            check_delta(world, session, activations(3), 0, "qkv")


def test_status_names_the_engine_and_its_operations(world: World, engine: Engine[Any]) -> None:
    with RawHost(world).opened() as host:
        answer = host.evaluate(2)
        assert isinstance(answer, frames.EvaluationResponse) and answer.counts.products > 0
        status = host.call("GetStatus", pb.GetStatusRequest())
        assert status.backend == engine.name
        assert status.operations.products >= answer.counts.products
        assert status.operations.rotations == status.operations.key_switches == 0


def test_repeated_and_malformed_requests_get_the_one_failure(world: World) -> None:
    with RawHost(world).opened() as host:
        first, _ = host.request(2)
        assert isinstance(host.send(frames.write_request(first)), frames.EvaluationResponse)
        unreduced = np.full_like(first.b, PARAMETERS.primes[0])
        for changes in ({"ids": first.ids}, {"b": unreduced}, {"key_number": 7}, {"plan": Plan(1, 1, 1)}):
            assert host.evaluate(2, **changes) == frames.EvaluationFailure(host.request_id)
        assert isinstance(host.evaluate(2), frames.EvaluationResponse)


def test_a_bad_public_key_is_refused(world: World) -> None:
    with RawHost(world) as host:
        host.begin()
        size = 4 * len(PARAMETERS.primes) * PARAMETERS.degree
        for key in (b"\xff" * size, bytes(size - 4)):
            with pytest.raises(InvalidInputError):
                host.complete(public_key=key)


def test_a_backend_that_cannot_run_here_stops_the_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openfhe", None)
    with pytest.raises(ConfigurationError, match="backend openfhe cannot run here"):
        build_coprocessor(world.settings.model_copy(update={"backend": "openfhe", "listen": "127.0.0.1:0"}))


def test_an_unknown_backend_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"--backend \(or TENSAFE_HE_LORA_BACKEND\)"):
        load_settings(["--packages", '["a"]', "--publisher-keys", '["b"]', "--tenant", "t", "--backend", "seal"])
