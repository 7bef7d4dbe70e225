"""Transformed weights: held once for all sessions, once for each plan, and counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from prometheus_client import REGISTRY

from services.he_lora.adapters import AdapterStore
from tensorguard.ckks.evaluator import Evaluator
from tensorguard.errors import LeaseExpiredError
from tensorguard.session.client import CoprocessorSession
from tests.support.coprocessor import ADAPTER, World


def gauge(adapter: str) -> float | None:
    return REGISTRY.get_sample_value("he_adapter_memory_bytes", {"adapter": adapter})


def test_sessions_share_the_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []
    evaluated: list[object] = []
    evaluate = Evaluator.evaluate

    def recording(self: Evaluator, group: object, *arguments: object, **named: object) -> object:
        used.append(group)
        return evaluate(self, group, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "evaluate", recording)
    x = np.ones((1, 48))
    for _ in range(2):
        with CoprocessorSession.open(world.endpoint, world.workload(), verify_keys=[world.publisher.public]) as session:
            session.attach(ADAPTER)
            used.clear()  # a session's warm-up evaluates something of its own
            session.begin(ADAPTER, 0, "qkv", x).wait()
            evaluated += used
    held = world.coprocessor.servicer._store.get(ADAPTER).group(0, "qkv")
    assert len(evaluated) == 2 and all(group is held for group in evaluated)


def test_memory_is_counted_per_adapter_until_it_is_dropped(world: World) -> None:
    adapter = world.coprocessor.servicer._store.get(ADAPTER)
    expected = sum(
        plan.weight_bytes(group.parameters, group.d_in, group.rows)
        for group in adapter.groups.values()
        for plan in group.plans
    )
    assert gauge(ADAPTER) == adapter.nbytes == expected > 0
    store = AdapterStore()
    store.put(dataclasses.replace(adapter, name="another"))
    assert gauge("another") == expected
    store.drop("another", LeaseExpiredError("over"))
    assert gauge("another") is None and gauge(ADAPTER) == expected
