"""An attack with everything that the inference host has after a run: it divides c1 by a and looks for A'.

The run is a real one, over gRPC, with a sealed adapter. The attacker knows the seeds it sent, so it knows a, and
knows the plans and the layout of weights, which are public. It gets more than a real response holds: the c1 modulo
p0 from before the modulus switch. Without the encryptions of zero that is enough to compute the whole secret delta;
with them, and on what a real response holds, it finds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tensorguard.ckks import kernels
from tensorguard.ckks.host import HostSession
from tensorguard.errors import DeltaUnavailableError
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tensorguard.session.link import Link
from tests.ckks import reference, stepwise
from tests.support.coprocessor import ADAPTER, World

Values = npt.NDArray[Any]


@dataclass
class Transcript:
    """What reached the host: (layer, group) -> what it sent and the c1 [responses, N] it received."""

    sent: dict[tuple[int, str], Any] = field(default_factory=dict)
    received: dict[tuple[int, str], Values] = field(default_factory=dict)


def run(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[Transcript, CoprocessorSession]:
    """One token through every group of the adapter, everything the host has written down."""
    transcript = Transcript()
    submit = Link._submit

    def watch(link: Link, adapter: str, shape: Any, key: Any, encrypted: Any) -> Any:
        reply = submit(link, adapter, shape, key, encrypted)
        original = reply.result

        class Watched:
            def result(self, timeout: float) -> Any:
                response = original(timeout)
                transcript.sent[shape.layer, shape.group] = (encrypted, key.host)
                transcript.received[shape.layer, shape.group] = response.c1.astype(np.int64)
                return response

        return Watched()

    monkeypatch.setattr(Link, "_submit", watch)
    # An attacker does not stop because a number is out of range.
    monkeypatch.setattr(HostSession, "decrypt", lambda *_: np.zeros((1, 1)))
    session = CoprocessorSession.open(
        world.endpoint,
        world.workload(),
        verify_keys=[world.publisher.public],
        options=SessionOptions(reply_seconds=60.0),
    )
    adapter = session.attach(ADAPTER)
    for (layer, group), shape in adapter.groups.items():
        try:
            session.begin(adapter, layer, group, np.ones((1, shape.d_in))).wait()
        except DeltaUnavailableError as error:  # pragma: no cover
            pytest.fail(str(error))
    assert transcript.received.keys() == adapter.groups.keys()
    return transcript, session


def divide(transcript: Transcript, session: CoprocessorSession, world: World) -> list[float]:
    """For every projection, how far U·(c1 / a) is from the secret delta matrix, relative to its norm."""
    (adapter,) = session._adapters.values()
    distances = []
    for info in adapter.manifest.moai.groups:
        shape = adapter.shape(info.layer, info.group)
        encrypted, host = transcript.sent[info.layer, info.group]
        plan, prime = encrypted.plan, int(host.parameters.primes[0])
        assert plan.blocks(shape.d_in) == 1  # so that c1 is one product and division is all it takes
        a = host._expander.expand(encrypted.ids.tolist(), encrypted.seeds)[0, 0].astype(object)
        inverses = np.array([pow(int(value), -1, prime) for value in a], dtype=object)
        a_prime = np.zeros((shape.rows, shape.d_in))
        for number, c1 in enumerate(transcript.received[info.layer, info.group]):
            quotient = reference.transform(c1.astype(np.uint64)[None], prime)[0].astype(object) * inverses % prime
            polynomial = reference.inverse(quotient.astype(np.uint64)[None], prime)[0].astype(np.int64)
            polynomial = np.where(polynomial > prime // 2, polynomial - prime, polynomial)
            for row in range(number * plan.rows, min((number + 1) * plan.rows, shape.rows)):
                start = plan.tokens * (row - number * plan.rows) * plan.channels
                block = polynomial[start : start + plan.tokens * plan.channels : plan.tokens]
                a_prime[row] = block[::-1][: shape.d_in] * shape.row_scales[row]
        row = 0
        for projection in info.projections:
            u = adapter.basis[info.layer, projection.name].astype(np.float64)
            found = u @ a_prime[row : row + u.shape[1]]
            row += u.shape[1]
            secret = world.delta(info.layer, projection.name, np.eye(shape.d_in)).T
            distances.append(float(np.linalg.norm(found - secret) / np.linalg.norm(secret)))
    return distances


def without_switch(
    request: Any, hiding: Any, plan: Any, skip: Any, first: int, c1: Values, c0: Values, *rest: Any
) -> None:
    """The evaluation without the modulus switch: c1 modulo p0 as it was before e1."""
    recover = kernels.recover

    def watch(sums: Values, errors: Any, flood: Any, response: int, i: int, *rest: Any) -> None:
        if i == 0:
            before[response - first] = sums[1]
        recover(sums, errors, flood, response, i, *rest)

    before = np.empty_like(c1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "recover", watch)
        stepwise.evaluate(request, hiding, plan, skip, first, c1, c0, *rest)
    c1[:] = reference.inverse(before.astype(np.uint64), 1073692673)


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "evaluate", without_switch)


@pytest.mark.usefixtures("generous")
def test_division_finds_the_secret_delta_where_nothing_is_added(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack is real: with re-randomisation off, the host computes every s·B·A to twelve bits."""
    monkeypatch.setattr(kernels, "add_encryption_of_zero", lambda *_: None)
    monkeypatch.setattr(kernels, "add_made_ahead", lambda *_: None)
    transcript, session = run(world, monkeypatch)
    with session:
        assert max(divide(transcript, session, world)) < 2**-9


@pytest.mark.usefixtures("generous")
def test_division_finds_nothing_even_before_the_modulus_switch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    transcript, session = run(world, monkeypatch)
    with session:
        assert min(divide(transcript, session, world)) > 1000


def test_division_finds_nothing_in_what_the_host_receives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    transcript, session = run(world, monkeypatch)
    with session:
        assert min(divide(transcript, session, world)) > 1000
