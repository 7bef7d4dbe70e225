"""Full mode through a real session: deltas arrive whole, and the host never holds a basis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.errors import PackageError
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tensorguard.session.handshake import HostHandshake
from tests.support.coprocessor import ADAPTER, World, running_world

D_IN = 48
RANDOM_ERROR = 2.0**-12


@pytest.fixture(scope="module")
def full_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("full"), mode="full") as running:
        yield running


@pytest.fixture
def session(full_world: World) -> Iterator[CoprocessorSession]:
    with _open(full_world) as session:
        session.attach(ADAPTER)
        yield session


def _open(world: World, **options: Any) -> CoprocessorSession:
    return CoprocessorSession.open(
        world.endpoint,
        world.workload(),
        verify_keys=[world.publisher.public],
        parameter_set=world.package.manifest.moai.parameter_set,
        options=SessionOptions(**{"reply_seconds": 60.0} | options),
    )


def check_deltas(world: World, session: CoprocessorSession, x: npt.NDArray[Any], layer: int, group: str) -> None:
    info = next(g for g in world.package.manifest.moai.groups if (g.layer, g.group) == (layer, group))
    deltas = session.begin(ADAPTER, layer, group, x).wait()
    assert deltas.shape == (len(x), sum(p.d_out for p in info.projections))
    for p in info.projections:
        expected = world.delta(layer, p.name, x)
        whole = np.linalg.norm(world.delta(layer, p.name, np.eye(D_IN)))
        error = np.abs(deltas[:, p.row_offset : p.row_offset + p.d_out] - expected)
        scale = np.linalg.norm(x, axis=1, keepdims=True) * whole / np.sqrt(D_IN)
        assert (error <= RANDOM_ERROR * scale).all(), (error / scale).max()


@pytest.mark.parametrize(("tokens", "group"), [(1, "qkv"), (1, "o"), (3, "qkv"), (70, "qkv")])
def test_deltas_are_the_plaintext_ones(full_world: World, session: CoprocessorSession, tokens: int, group: str) -> None:
    x = np.random.default_rng(tokens).normal(size=(tokens, D_IN)).astype(np.float32)
    check_deltas(full_world, session, x, 1, group)


def test_long_responses_come_in_several_frames(full_world: World) -> None:
    # A chunk of 64 tokens takes more down than up here, so the response decides where calls are cut.
    with _open(full_world, frame_bytes=300_000) as session:
        session.attach(ADAPTER)
        x = np.random.default_rng(0).normal(size=(150, D_IN))
        check_deltas(full_world, session, x, 0, "qkv")
        assert session._link is not None and session._link.stream._next_id > 3


def test_the_host_gets_no_basis(
    full_world: World, session: CoprocessorSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the message (what it is sealed for is empty) nor in the attached adapter."""
    opened: list[bytes] = []
    open_basis = HostHandshake.open_basis

    def recording(self: HostHandshake, sealed: bytes, adapter: str, manifest_digest: str) -> bytes:
        opened.append(open_basis(self, sealed, adapter, manifest_digest))
        return opened[-1]

    monkeypatch.setattr(HostHandshake, "open_basis", recording)
    assert session.attach(ADAPTER).basis == {}
    assert opened == [b""]


def test_a_basis_in_full_mode_is_refused(
    full_world: World, session: CoprocessorSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = full_world.coprocessor.servicer._store
    served = dataclasses.replace(store.get(ADAPTER), basis=b"something")
    monkeypatch.setattr(store, "get", lambda name: served)
    with pytest.raises(PackageError, match="full mode has no basis"):
        session.attach(ADAPTER)
