"""The host's session against a real coprocessor, an unlucky one and a cheating one."""

from __future__ import annotations

import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client import REGISTRY

from services.he_lora.server import build_coprocessor
from services.he_lora.servicer import HeLoraServicer
from tensorguard.ckks import Evaluator, kernels
from tensorguard.ckks.idle import ProcessorUse
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import (
    AuthenticationError,
    BudgetExhaustedError,
    ConfigurationError,
    DeltaUnavailableError,
    InvalidInputError,
    LeaseExpiredError,
    NotFoundError,
    PackageError,
    PermissionDeniedError,
    TenSafeError,
    TokenError,
    UnavailableError,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.observability.logging import configure_logging
from tensorguard.package.envelope import make_envelope, verify_envelope
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.rpc.server import Server, ServerOptions, build_server
from tensorguard.session import frames
from tensorguard.session.client import CoprocessorSession, PendingDelta, SessionOptions
from tensorguard.session.handshake import HostHandshake
from tensorguard.session.keys import LinkKey
from tensorguard.session.transcript import join_basis
from tests.support.coprocessor import ADAPTER, World, running_world

D_IN = 48
WORST_ERROR, RANDOM_ERROR = 2.0**-9, 2.0**-12


def activations(tokens: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(tokens, D_IN)).astype(np.float32)


@contextmanager
def session_with(world: World, endpoint: str | None = None, **options: Any) -> Iterator[CoprocessorSession]:
    session = CoprocessorSession.open(
        endpoint or world.endpoint,
        world.workload(),
        verify_keys=[world.publisher.public],
        options=SessionOptions(**{"reply_seconds": 60.0} | options),
    )
    try:
        session.attach(ADAPTER)
        yield session
    finally:
        session.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def session(world: World) -> Iterator[CoprocessorSession]:
    with session_with(world) as opened:
        yield opened


def check_delta(world: World, session: CoprocessorSession, x: npt.NDArray[Any], layer: int, group: str) -> None:
    """delta = U z is the plaintext delta, with P4's error: relative to |x| |A'|_F / sqrt(d) = |x| |sBA|_F / sqrt(d)."""
    adapter = session._adapters[ADAPTER]
    z = session.begin(adapter, layer, group, x).wait()
    info = next(g for g in adapter.manifest.moai.groups if (g.layer, g.group) == (layer, group))
    assert z.shape == (len(x), info.rows) and z.dtype == np.float64
    for p in info.projections:
        u = adapter.basis[layer, p.name].astype(np.float64)
        expected = world.delta(layer, p.name, x)
        whole = np.linalg.norm(world.delta(layer, p.name, np.eye(D_IN)))
        error = np.abs(z[:, p.row_offset : p.row_offset + p.rank] @ u.T - expected)
        scale = np.linalg.norm(x, axis=1, keepdims=True) * whole / np.sqrt(D_IN)
        assert (error <= RANDOM_ERROR * scale).all(), (error / scale).max()


# What it computes


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 33, 200])
def test_delta_equals_the_plaintext_one(world: World, session: CoprocessorSession, tokens: int) -> None:
    check_delta(world, session, activations(tokens, tokens), 1, "qkv")


@pytest.mark.parametrize("group", ["qkv", "o"])
def test_float64_and_strided_activations(world: World, session: CoprocessorSession, group: str) -> None:
    wide = np.random.default_rng(1).normal(size=(4, 2 * D_IN))
    check_delta(world, session, wide[:, ::2], 0, group)


def test_many_in_flight(world: World, session: CoprocessorSession) -> None:
    inputs = [activations(3, seed) for seed in range(12)]
    pending = [session.begin(ADAPTER, 0, "o", x) for x in inputs]
    alone = [session.begin(ADAPTER, 0, "o", x).wait() for x in inputs]
    for delta, expected in zip(reversed(pending), reversed(alone), strict=True):
        np.testing.assert_allclose(delta.wait(), expected, atol=1e-3 * np.abs(expected).max())


def test_several_threads(world: World, session: CoprocessorSession) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            for _ in range(5):
                check_delta(world, session, activations(2, seed), seed % 2, "qkv")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_long_input_goes_in_several_frames(world: World) -> None:
    with session_with(world, frame_bytes=100_000) as session:
        check_delta(world, session, activations(150), 0, "qkv")
        assert session._link is not None and session._link.stream._next_id > 2


def test_key_rotates_by_itself(world: World) -> None:
    with session_with(world, tokens_per_key=10) as session:
        numbers = []
        for _ in range(6):
            check_delta(world, session, activations(4), 0, "qkv")
            check_delta(world, session, activations(4), 1, "o")
            assert session._link is not None
            numbers.append(session._link.key.number)
        assert numbers == [0, 0, 1, 1, 2, 2]


def test_keys_rotate_under_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request fails, no key serves more than its bound, and keys and pools end on both sides."""
    made: list[LinkKey] = []
    announce = CoprocessorSession._announce

    def recording(session: CoprocessorSession, handshake: HostHandshake) -> LinkKey:
        made.append(announce(session, handshake))
        return made[-1]

    monkeypatch.setattr(CoprocessorSession, "_announce", recording)
    monkeypatch.setattr(ProcessorUse, "idle", lambda _: True)  # this machine may be busy with other tests
    evaluators: list[Evaluator] = []
    with session_with(world, tokens_per_key=40) as session:
        assert session._link is not None
        peer = world.coprocessor.servicer._registry.get(session._link.handshake.transcript.session_id)

        def run(seed: int) -> None:
            for n in range(15):
                check_delta(world, session, activations(3, 20 * seed + n), seed % 2, "qkv")
                evaluators.extend(peer.keys.values())

        with ThreadPoolExecutor(4) as threads:
            for result in [threads.submit(run, seed) for seed in range(4)]:
                result.result(60)
        assert session.stats.failures == 0 and session.healthy
        current = session._link.key.number
        assert current >= 2  # 30 calls of 3 rows through each of two groups
        assert all(max(key.used.values(), default=0) <= 40 for key in made)
        assert [key.host.closed for key in made[: current - 1]] == [True] * (current - 1)
        assert made[current - 1].host.pool.closed
        assert min(peer.keys) >= current - 1 and len(peer.keys) <= 3
        gone = set(evaluators) - set(peer.keys.values())
        assert gone and all(evaluator.pool.closed for evaluator in gone)
    assert all(key.host.closed and key.host.pool.closed for key in made)
    wait_until(lambda: all(evaluator.pool.closed for evaluator in evaluators))


def test_pools_on_both_sides_are_filled_while_nothing_happens_and_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessorUse, "idle", lambda _: True)

    def used(side: str) -> float:
        return REGISTRY.get_sample_value("he_pool_elements_total", {"side": side, "event": "taken"}) or 0.0

    before = used("coprocessor")
    with session_with(world, pool_bytes=200_000) as session:
        assert session._link is not None
        peer = world.coprocessor.servicer._registry.get(session._link.handshake.transcript.session_id)
        wait_until(lambda: len(session._link.key.host.pool) == 4 and len(peer.keys[0].pool) >= 4)
        check_delta(world, session, activations(5), 1, "qkv")
        check_delta(world, session, activations(5), 1, "o")
        stats = session.stats
        assert 0 < stats.ciphertexts_pooled <= 4 and stats.failures == 0
        assert used("coprocessor") > before


def test_without_pools(world: World) -> None:
    with session_with(world, pool_bytes=0) as session:
        assert session._link is not None and session._filler is None
        assert session._link.key.host.pool.capacity == 0
        check_delta(world, session, activations(5), 1, "qkv")
        assert session.stats.ciphertexts_pooled == 0 < session.stats.ciphertexts_in_line


def test_old_keys_are_wiped(world: World) -> None:
    with session_with(world, tokens_per_key=1) as session:
        assert session._link is not None
        first = session._link.key.host
        waiting = session.begin(ADAPTER, 0, "o", activations(1))
        session.begin(ADAPTER, 0, "o", activations(1)).wait()
        waiting.wait()
        assert not first.closed, "the previous key may still have requests in flight"
        session.begin(ADAPTER, 0, "o", activations(1)).wait()
        assert first.closed


def test_stats(session: CoprocessorSession) -> None:
    session.begin(ADAPTER, 0, "o", activations(5)).wait()
    stats = session.stats.snapshot()
    assert stats["calls"] == 1 and stats["tokens"] == 5 and stats["failures"] == 0
    assert stats["bytes_up"] > 46_080 and stats["bytes_down"] >= 15_360
    assert stats["encrypt_seconds"] > 0 and stats["evaluate_seconds"] > 0 and stats["products"] > 0
    assert stats["rerandomisations"] == stats["modulus_switches"] > 0
    assert stats["rotations"] == stats["evaluation_key_bytes"] == 0


def test_attach(world: World, session: CoprocessorSession) -> None:
    adapter = session.attach(ADAPTER)
    assert (adapter.name, adapter.digest, adapter.sequence) == (ADAPTER, world.package.digest, 1)
    assert adapter.manifest == world.package.manifest and session.evidence_kind == "simulated"
    assert adapter.basis[0, "q_proj"].shape == (48, 4) and adapter.basis[0, "q_proj"].dtype == np.float32
    with pytest.raises(NotFoundError):
        session.attach("nobody")


# What a wrong caller gets: the session survives


@pytest.mark.parametrize(
    ("layer", "group", "x"),
    [
        (0, "qkv", np.full((1, D_IN), np.nan)),
        (0, "qkv", np.full((1, D_IN), np.inf)),
        (0, "qkv", np.ones((1, D_IN + 1))),
        (0, "qkv", np.ones(D_IN)),
        (0, "qkv", np.ones((0, D_IN))),
        (0, "down", np.ones((1, D_IN))),
        (9, "qkv", np.ones((1, D_IN))),
    ],
)
def test_bad_input_is_never_sent(
    world: World, session: CoprocessorSession, layer: int, group: str, x: npt.NDArray[Any]
) -> None:
    sent = session.stats.bytes_up
    with pytest.raises(DeltaUnavailableError, match=r"^delta unavailable$"):
        session.begin(ADAPTER, layer, group, x).wait()
    assert session.stats.bytes_up == sent and session.healthy
    check_delta(world, session, activations(1), 0, "qkv")


def test_late_nan_in_a_long_input_is_not_sent_either(world: World) -> None:
    with session_with(world, frame_bytes=100_000) as session:
        x = activations(150)
        x[149, 3] = np.nan
        sent = session._link.stream.bytes_sent if session._link else -1
        assert fails(session.begin(ADAPTER, 0, "qkv", x))
        assert session._link is not None and session._link.stream.bytes_sent == sent


def test_unattached_adapter(session: CoprocessorSession) -> None:
    with pytest.raises(DeltaUnavailableError):
        session.begin("nobody", 0, "qkv", activations(1)).wait()
    assert session.healthy


# Opening fails with the error that says why


def test_no_coprocessor(world: World) -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 "):
        CoprocessorSession.open(
            "127.0.0.1:1",
            world.workload(),
            verify_keys=[world.publisher.public],
            options=SessionOptions(connect_seconds=0.1),
        )


def test_coprocessor_role_cannot_be_a_host(world: World) -> None:
    with pytest.raises(PermissionDeniedError):
        CoprocessorSession.open(
            world.endpoint, world.workload(Role.COPROCESSOR, ADAPTER), verify_keys=[world.publisher.public]
        )


def test_unknown_parameter_set(world: World) -> None:
    with pytest.raises(ConfigurationError, match="unknown parameter set"):
        CoprocessorSession.open(
            world.endpoint, world.workload(), verify_keys=[world.publisher.public], parameter_set="n512"
        )


def test_other_parameter_set_than_the_adapters(world: World) -> None:
    session = CoprocessorSession.open(
        world.endpoint, world.workload(), verify_keys=[world.publisher.public], parameter_set="n4096-q90-w16"
    )
    with session, pytest.raises(InvalidInputError, match="needs parameter set n4096-q90-w1"):
        session.attach(ADAPTER)


def test_without_a_publisher_key_nothing_is_attached(world: World) -> None:
    with pytest.raises(ConfigurationError, match="publisher_keys"):
        CoprocessorSession.open(world.endpoint, world.workload(), verify_keys=[])


def test_a_package_of_another_policy_is_refused(
    world: World, session: CoprocessorSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session._link is not None
    peer = session._link.handshake.peer
    named = ReleasePolicy(id="strict", sha256=peer.policy_sha256)
    manifest = world.package.manifest.model_copy(update={"release_policy": named})
    envelope = make_envelope(manifest, world.publisher)
    store = world.coprocessor.servicer._store
    digest = verify_envelope(envelope, world.publisher.public).digest
    served = dataclasses.replace(store.get(ADAPTER), envelope=envelope, digest=digest)
    monkeypatch.setattr(store, "get", lambda name: served)
    assert session.attach(ADAPTER).manifest.release_policy == named
    other = dataclasses.replace(peer, policy_sha256="ab" * 32)
    monkeypatch.setattr(session._link.handshake, "peer", other)
    with pytest.raises(PackageError, match="policy strict"):
        session.attach(ADAPTER)


def test_other_publisher_is_refused(world: World) -> None:
    other = SigningKeys.generate().public
    session = CoprocessorSession.open(world.endpoint, world.workload(), verify_keys=[other])
    with session, pytest.raises(PackageError, match="not trusted"):
        session.attach(ADAPTER)


# Failures of the coprocessor: one error for all, and recovery


def fails(
    pending: PendingDelta, timeout: float | None = None, error: type[TenSafeError] = DeltaUnavailableError
) -> bool:
    with pytest.raises(TenSafeError) as caught:
        pending.wait(timeout)
    assert type(caught.value) is error
    assert error is not DeltaUnavailableError or caught.value.message == "delta unavailable"
    return True


def test_coprocessor_killed_and_back(tmp_path: Any) -> None:
    with (
        running_world(tmp_path) as world,
        session_with(world, first_backoff_seconds=0.01, reconnect_seconds=0.1) as session,
    ):
        check_delta(world, session, activations(2), 0, "qkv")
        address = world.endpoint
        world.coprocessor.server.stop(0)
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
        with pytest.raises(DeltaUnavailableError):
            session.ensure_open()
        old = world.coprocessor
        old.close()
        world.coprocessor = build_coprocessor(world.settings.model_copy(update={"listen": address}))
        world.coprocessor.start()
        deadline = time.monotonic() + 10
        while not session.healthy and time.monotonic() < deadline:
            try:
                session.ensure_open()
            except DeltaUnavailableError:
                time.sleep(0.02)
        check_delta(world, session, activations(2), 0, "qkv")


def test_backoff_does_not_hammer(tmp_path: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, first_backoff_seconds=5.0) as session:
        attempts: list[int] = []

        def refuse(_: float) -> Any:
            attempts.append(1)
            raise UnavailableError("gone")

        monkeypatch.setattr(session, "_connect", refuse)
        assert session._link is not None
        session._break(session._link, UnavailableError("test"))
        for _ in range(5):
            with pytest.raises(DeltaUnavailableError):
                session.ensure_open()
        assert len(attempts) == 1


def test_old_evidence_is_renewed_between_requests(world: World) -> None:
    with session_with(world, reattest_seconds=0.0) as session:
        first = session._link
        session.ensure_open()
        assert session._link is not first and first is not None and first.key.host.closed
        check_delta(world, session, activations(1), 0, "qkv")


def test_old_session_serves_on_when_renewal_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, reattest_seconds=0.0) as session:

        def refuse(_: float) -> Any:
            raise UnavailableError("attestor gone")

        monkeypatch.setattr(session, "_connect", refuse)
        session.ensure_open()
        check_delta(world, session, activations(1), 0, "qkv")


def test_reopening_does_not_hold_up_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, reattest_seconds=0.0) as session:
        connecting, go_on = threading.Event(), threading.Event()
        connect = session._connect

        def slow(seconds: float) -> Any:
            connecting.set()
            assert go_on.wait(10)
            return connect(seconds)

        monkeypatch.setattr(session, "_connect", slow)
        thread = threading.Thread(target=session.ensure_open)
        thread.start()
        assert connecting.wait(10) and session.healthy
        check_delta(world, session, activations(1), 0, "qkv")
        first = session._link
        go_on.set()
        thread.join()
        assert session._link is not first


def test_requests_sent_meanwhile_keep_the_old_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, reattest_seconds=0.0) as session:
        connect, first = session._connect, session._link
        assert first is not None

        def busy(seconds: float) -> Any:
            fresh = connect(seconds)
            monkeypatch.setattr(type(first.stream), "pending", 1)
            return fresh

        monkeypatch.setattr(session, "_connect", busy)
        session.ensure_open()
        assert session._link is first and first.alive
        monkeypatch.undo()
        check_delta(world, session, activations(1), 0, "qkv")


def test_closing_while_reopening(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, reattest_seconds=0.0) as session:
        connect, made = session._connect, []

        def closed_meanwhile(seconds: float) -> Any:
            made.append(connect(seconds))
            session.close()
            return made[0]

        monkeypatch.setattr(session, "_connect", closed_meanwhile)
        with pytest.raises(DeltaUnavailableError):
            session.ensure_open()
        assert session._link is None and made[0].key.host.closed


def test_another_kind_of_evidence_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world) as session:
        monkeypatch.setattr(session, "_kind", EvidenceKind.TDX)
        assert session._link is not None
        session._break(session._link, UnavailableError("test"))
        with pytest.raises(DeltaUnavailableError):
            session.ensure_open()


def test_closed_session(world: World) -> None:
    with session_with(world) as session:
        assert session._link is not None
        key = session._link.key.host
        session.close()
        assert key.closed and fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
        with pytest.raises(DeltaUnavailableError):
            session.ensure_open()
        with pytest.raises(UnavailableError):
            session.attach(ADAPTER)


# Coprocessors that cheat


class Cheat(HeLoraServicer):
    """A coprocessor whose messages are changed on their way out."""

    change: Callable[[frames.EvaluationResponse], bytes] | None = None
    on_begin: Callable[[pb.BeginSessionRequest, pb.BeginSessionResponse], None] | None = None
    on_attach: Callable[[pb.AttachAdapterResponse, Any], None] | None = None

    def BeginSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = super().BeginSession(request, context)
        if self.on_begin is not None:
            self.on_begin(request, answer)
        return answer

    def AttachAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = super().AttachAdapter(request, context)
        if self.on_attach is not None:
            self.on_attach(answer, self._registry.get(request.session_id))
        return answer

    def Evaluate(self, request_iterator: Any, context: Any) -> Iterator[bytes]:  # noqa: N802
        for message in super().Evaluate(request_iterator, context):
            response = frames.read_response(message, self.parameters)
            if self.change is None or not isinstance(response, frames.EvaluationResponse):
                yield message
            else:
                yield self.change(response)

    @property
    def parameters(self) -> Any:
        return self._store.all()[0].parameters


@pytest.fixture
def cheat(world: World) -> Iterator[tuple[Cheat, Server]]:
    original = world.coprocessor.servicer
    servicer = Cheat(original._workload, original._store, original._registry, original._evaluation, original._engine)
    server = build_server([servicer.service()], ServerOptions("127.0.0.1:0", workers=8))
    server.start()
    yield servicer, server
    server.stop(0)


def test_honest_cheat(world: World, cheat: tuple[Cheat, Server]) -> None:
    with session_with(world, cheat[1].address) as session:
        check_delta(world, session, activations(1), 0, "qkv")


def with_arrays(response: frames.EvaluationResponse, **changes: Any) -> bytes:
    values = {name: getattr(response, name) for name in frames.EvaluationResponse.__slots__} | changes
    return frames.write_response(frames.EvaluationResponse(**values))


def poked(array: npt.NDArray[np.uint32], value: int) -> npt.NDArray[np.uint32]:
    copy = array.copy()
    copy.flat[0] = value
    return copy


TAMPERS: dict[str, Callable[[frames.EvaluationResponse], bytes]] = {
    "unreduced c1": lambda r: with_arrays(r, c1=poked(r.c1, 2**30 - 1)),
    "unreduced c0": lambda r: with_arrays(r, c0=poked(r.c0, 2**30)),
    "random c1": lambda r: with_arrays(r, c1=np.random.default_rng(1).integers(0, 2**29, r.c1.shape, dtype=np.uint32)),
    "too few rows": lambda r: with_arrays(r, c0=r.c0[:, :-1]),
    "too many responses": lambda r: with_arrays(r, c1=np.concatenate([r.c1, r.c1])),
    "a rotation": lambda r: with_arrays(r, counts=dataclasses.replace(r.counts, rotations=1)),
    "a key switch": lambda r: with_arrays(r, counts=dataclasses.replace(r.counts, key_switches=1)),
    "an evaluation key": lambda r: with_arrays(r, counts=dataclasses.replace(r.counts, evaluation_key_bytes=1)),
    "another version": lambda r: with_arrays(r).replace(bytes([frames.VERSION, 2]), bytes([frames.VERSION + 1, 2]), 1),
    "an unknown failure": lambda r: frames.write_failure(r.request_id, 4),
    "another request's id": lambda r: with_arrays(r, request_id=r.request_id + 1000),
    "garbage": lambda r: b"\x0a\x05abcde",
    "empty": lambda r: b"",
    "truncated": lambda r: with_arrays(r)[:-3],
}


@pytest.mark.parametrize("name", TAMPERS)
def test_wrong_response_destroys_the_key(world: World, cheat: tuple[Cheat, Server], name: str) -> None:
    servicer, server = cheat
    with session_with(world, server.address) as session:
        assert session._link is not None
        link = session._link
        servicer.change = TAMPERS[name]
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(32)))
        assert not session.healthy and link.key.host.closed
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1))), "nothing more under this key"
        servicer.change = None
        session.ensure_open()
        assert session._link is not link
        check_delta(world, session, activations(1), 0, "qkv")


# Checked mode


def off_by(steps: int) -> Callable[[frames.EvaluationResponse], bytes]:
    """One value of the first token changed by so many residues, as a probe of the key would."""
    prime = 1073692673
    return lambda r: with_arrays(r, c0=poked(r.c0, (int(r.c0.flat[0]) + steps) % prime))


@pytest.mark.parametrize("tokens", [1, 2, 8, 150])
def test_checked_mode_gives_the_same_deltas(world: World, tokens: int) -> None:
    with session_with(world, checked=True, frame_bytes=100_000) as session:
        check_delta(world, session, activations(tokens, tokens), 1, "qkv")


def test_a_check_row_is_charged(world: World) -> None:
    with session_with(world, checked=True, tokens_per_key=10) as session:
        meter = world.coprocessor.servicer._store.get(ADAPTER).meter
        seen = meter._seen.get((0, "o"), 0)
        session.begin(ADAPTER, 0, "o", activations(4)).wait()
        assert meter._seen[0, "o"] == seen + 5
        assert session._link is not None and session._link.key.used[ADAPTER, 0, "o"] == 5
        session.begin(ADAPTER, 0, "o", activations(5)).wait()
        assert session._link.key.number == 1, "four rows and five, and a check row with each, are more than ten"


def test_only_checked_mode_finds_a_small_change(world: World, cheat: tuple[Cheat, Server]) -> None:
    servicer, server = cheat
    with session_with(world, server.address) as session:
        servicer.change = off_by(1 << 14)
        session.begin(ADAPTER, 0, "qkv", activations(1)).wait()
        assert session.healthy
    servicer.change = None
    with session_with(world, server.address, checked=True) as session:
        assert session._link is not None
        link = session._link
        check_delta(world, session, activations(1), 0, "qkv")
        servicer.change = off_by(1 << 14)
        sent = link.stream.bytes_sent
        pending = session.begin(ADAPTER, 0, "qkv", activations(1))
        once = link.stream.bytes_sent - sent
        assert fails(pending)
        assert not session.healthy and link.key.host.closed
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1))), "nothing more under this key"
        assert link.stream.bytes_sent - sent == once > 0, "and nothing is sent again"
        servicer.change = None
        session.ensure_open()
        check_delta(world, session, activations(1), 0, "qkv")


def test_refusal_fails_only_its_request(world: World, cheat: tuple[Cheat, Server]) -> None:
    servicer, server = cheat
    with session_with(world, server.address) as session:
        servicer.change = lambda response: frames.write_failure(response.request_id)
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
        assert session.healthy
        servicer.change = None
        check_delta(world, session, activations(1), 0, "qkv")


def test_an_answer_under_the_next_requests_id_is_refused(world: World, cheat: tuple[Cheat, Server]) -> None:
    """Under the same key it would decrypt, to another request's values."""
    servicer, server = cheat
    sent = threading.Event()

    def renamed(response: frames.EvaluationResponse) -> bytes:
        assert sent.wait(10)
        return with_arrays(response, request_id=response.request_id + 1)

    servicer.change = renamed
    with session_with(world, server.address) as session:
        first, second = (session.begin(ADAPTER, 0, "qkv", activations(1, seed)) for seed in range(2))
        sent.set()
        assert fails(second) and fails(first) and not session.healthy


def test_a_stream_that_is_reset_fails_what_is_in_flight_and_opens_again(
    world: World, cheat: tuple[Cheat, Server]
) -> None:
    servicer, server = cheat

    def reset(response: frames.EvaluationResponse) -> bytes:
        raise RuntimeError("the stream ends")

    with session_with(world, server.address) as session:
        check_delta(world, session, activations(1), 0, "qkv")
        servicer.change = reset
        pending = [session.begin(ADAPTER, 0, "qkv", activations(1)) for _ in range(3)]
        assert all(fails(delta) for delta in pending)
        assert not session.healthy
        servicer.change = None
        session.ensure_open()
        check_delta(world, session, activations(1), 0, "qkv")


def test_an_attestor_that_is_away_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world, first_backoff_seconds=0.01, longest_backoff_seconds=0.02) as session:
        assert session._link is not None
        token = session._workload.token

        def away() -> str:
            raise UnavailableError("attestor gone")

        monkeypatch.setattr(session._workload, "token", away)
        session._break(session._link, UnavailableError("test"))
        for _ in range(3):
            with pytest.raises(DeltaUnavailableError):
                session.ensure_open()
            assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
            time.sleep(0.03)
        monkeypatch.setattr(session._workload, "token", token)
        session.ensure_open()
        check_delta(world, session, activations(1), 0, "qkv")


def test_silence_times_out(world: World, cheat: tuple[Cheat, Server]) -> None:
    servicer, server = cheat
    release = threading.Event()

    def hold(response: frames.EvaluationResponse) -> bytes:
        release.wait(10)
        return with_arrays(response)

    servicer.change = hold
    with session_with(world, server.address) as session:
        try:
            assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), timeout=0.05)
            assert not session.healthy
        finally:
            release.set()


def reflect(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_nonce = request.host_nonce


def other_nonce(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_nonce = bytes(32)


def unsigned(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.signature = b""


def hosts_token(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_token = request.host_token


def no_token(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.coprocessor_token = ""


def short_id(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
    answer.session_id = b"x"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (reflect, InvalidInputError),
        (other_nonce, AuthenticationError),
        (unsigned, AuthenticationError),
        (hosts_token, PermissionDeniedError),
        (no_token, TokenError),
        (short_id, InvalidInputError),
    ],
)
def test_impostor_coprocessor(world: World, cheat: tuple[Cheat, Server], change: Any, error: type[Exception]) -> None:
    cheat[0].on_begin = change
    with pytest.raises(error):
        CoprocessorSession.open(cheat[1].address, world.workload(), verify_keys=[world.publisher.public])


def test_stolen_coprocessor_token(world: World, cheat: tuple[Cheat, Server]) -> None:
    """Somebody in between who has the coprocessor's token, but not its key."""
    thief = WorkloadIdentity.generate()

    def sign(request: pb.BeginSessionRequest, answer: pb.BeginSessionResponse) -> None:
        answer.signature = thief.sign(b"anything")

    cheat[0].on_begin = sign
    with pytest.raises(AuthenticationError):
        CoprocessorSession.open(cheat[1].address, world.workload(), verify_keys=[world.publisher.public])


def test_basis_must_come_from_the_attested_coprocessor(world: World, cheat: tuple[Cheat, Server]) -> None:
    """Anyone can seal to the host's public key: the basis is signed as well."""
    thief = WorkloadIdentity.generate()

    def replace(answer: pb.AttachAdapterResponse, session: Any) -> None:
        info = session.transcript.basis_info(ADAPTER, world.package.digest)
        basis = world.coprocessor.servicer._store.get(ADAPTER).basis
        answer.sealed_basis = session.host.identity.seal(join_basis(thief.sign(b""), basis), info)

    cheat[0].on_attach = replace
    with (
        CoprocessorSession.open(cheat[1].address, world.workload(), verify_keys=[world.publisher.public]) as session,
        pytest.raises(AuthenticationError),
    ):
        session.attach(ADAPTER)


def test_tampered_manifest(world: World, cheat: tuple[Cheat, Server]) -> None:
    def replace(answer: pb.AttachAdapterResponse, session: Any) -> None:
        answer.manifest_envelope = answer.manifest_envelope.replace(b'"sequence":1', b'"sequence":2')

    cheat[0].on_attach = replace
    session = CoprocessorSession.open(cheat[1].address, world.workload(), verify_keys=[world.publisher.public])
    with session, pytest.raises(PackageError):
        session.attach(ADAPTER)


# Keys that vanish while they are used


def closed_during(session: CoprocessorSession, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another thread close the session's key while the engine's kernel `name` runs."""
    assert session._link is not None
    key, kernel = session._link.key.host, getattr(kernels, name)

    def closed(*arguments: Any) -> Any:
        threading.Thread(target=key.close, daemon=True).start()
        while not key.closed:
            time.sleep(0.001)
        return kernel(*arguments)

    monkeypatch.setattr(kernels, name, closed)


def test_nothing_leaves_under_a_key_that_was_wiped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world) as session:
        closed_during(session, "encrypt", monkeypatch)
        sent = session.stats.bytes_up
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
        assert session.stats.bytes_up == sent and not session.healthy


def test_no_delta_from_a_key_that_was_wiped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with(world) as session:
        pending = session.begin(ADAPTER, 0, "qkv", activations(1))
        closed_during(session, "decrypt", monkeypatch)
        assert fails(pending)


# Limits of the coprocessor


def test_budget_spent(tmp_path: Any) -> None:
    with (
        running_world(tmp_path, tokens_per_release=20, tokens_per_lease=20) as world,
        session_with(world) as session,
    ):
        check_delta(world, session, activations(12), 0, "qkv")
        check_delta(world, session, activations(12), 1, "o")
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(9)), error=BudgetExhaustedError)
        check_delta(world, session, activations(8), 0, "qkv")
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), error=BudgetExhaustedError)
        assert session.healthy


def test_lease_over(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.he_lora.leases.LeaseKeeper.start", lambda self: None)
    monkeypatch.setattr("services.he_lora.leases.LeaseKeeper.stop", lambda self: None)
    with running_world(tmp_path) as world, session_with(world) as session:
        check_delta(world, session, activations(1), 0, "qkv")
        meter = world.coprocessor.servicer._store.get(ADAPTER).meter
        ends = meter.terms.expires_at
        monkeypatch.setattr(meter, "_clock", lambda: ends)
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), error=LeaseExpiredError)
        assert session.healthy
        with pytest.raises(TenSafeError, match="lease"):
            session.attach(ADAPTER)


def test_a_session_outlives_a_lease_that_ended_and_a_budget_that_was_spent(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its coprocessor has a new lease, or more tokens, nothing needs to be opened again."""
    monkeypatch.setattr("services.he_lora.leases.LeaseKeeper.start", lambda self: None)
    monkeypatch.setattr("services.he_lora.leases.LeaseKeeper.stop", lambda self: None)
    with running_world(tmp_path) as world, session_with(world) as session:
        (keeper,), link = world.coprocessor.keepers, session._link
        meter = world.coprocessor.servicer._store.get(ADAPTER).meter
        check_delta(world, session, activations(1), 0, "qkv")
        meter.renewed(dataclasses.replace(meter.terms, tokens_granted=meter.used))
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), error=BudgetExhaustedError)
        keeper.step()
        check_delta(world, session, activations(1), 0, "qkv")
        meter.end()
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), error=LeaseExpiredError)
        keeper.step()
        assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)), error=LeaseExpiredError)
        keeper.step()
        check_delta(world, session, activations(1), 0, "qkv")
        assert session._link is link


# Nothing secret in the logs


def test_logs_carry_no_secrets(world: World, cheat: tuple[Cheat, Server]) -> None:
    log = io.StringIO()
    configure_logging("test", level="debug", stream=log)
    servicer, server = cheat
    x = activations(2)
    with session_with(world, server.address) as session:
        assert session._link is not None
        transcript = session._link.handshake.transcript
        z = session.begin(ADAPTER, 0, "qkv", x).wait()
        servicer.change = TAMPERS["unreduced c1"]
        assert fails(session.begin(ADAPTER, 0, "qkv", x))
        assert fails(session.begin(ADAPTER, 0, "qkv", x * np.nan))
    text = log.getvalue()
    assert "session broken" in text
    secrets = [transcript.host_token, transcript.coprocessor_token]
    secrets += [value.hex() for value in (transcript.session_id, transcript.host_nonce, transcript.pk1_seed(0))]
    secrets += [f"{value:.6g}" for value in (*x.ravel(), *z.ravel())]
    assert not [secret for secret in secrets if secret in text]
