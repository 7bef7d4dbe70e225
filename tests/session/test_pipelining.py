"""What is under way at the same time: requests, their parts, and the sessions of one coprocessor.

Each test makes the later thing wait for the earlier one's event; without the overlap it would wait in vain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensorguard.ckks import Evaluator, HostSession
from tests.session.test_client import activations, check_delta, session_with
from tests.support.coprocessor import ADAPTER, World

IN_VAIN = 10.0
SMALL_FRAMES = {"frame_bytes": 1}
"""A frame for every few tokens."""


def before(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, do: Callable[[int], object]) -> None:
    """Have `do` run before each call of a method, with the number of the call, from 0."""
    original, calls = getattr(owner, name), iter(range(1000))

    def method(*args: Any, **kwargs: Any) -> Any:
        do(next(calls))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def test_the_caller_goes_on_while_the_coprocessor_works(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, waited = threading.Event(), []
    with session_with(world) as session:
        before(monkeypatch, Evaluator, "evaluate", lambda _: waited.append(begun.wait(IN_VAIN)))
        pending = session.begin(ADAPTER, 0, "qkv", activations(1))
        begun.set()  # where the hook computes the layer's own product
        pending.wait()
    assert waited == [True]


def test_the_coprocessor_starts_before_all_of_a_long_input_is_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluating, waited = threading.Event(), []
    with session_with(world, **SMALL_FRAMES) as session:
        before(monkeypatch, Evaluator, "evaluate", lambda _: evaluating.set())
        before(monkeypatch, HostSession, "encrypt", lambda call: call == 1 and waited.append(evaluating.wait(IN_VAIN)))
        check_delta(world, session, activations(200), 0, "qkv")
    assert waited == [True]


def test_the_first_part_is_decrypted_while_the_next_is_evaluated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decrypting, waited = threading.Event(), []
    with session_with(world, **SMALL_FRAMES) as session:
        before(monkeypatch, HostSession, "decrypt", lambda _: decrypting.set())
        before(monkeypatch, Evaluator, "evaluate", lambda call: call == 1 and waited.append(decrypting.wait(IN_VAIN)))
        check_delta(world, session, activations(200), 0, "qkv")
    assert waited == [True]


def test_sessions_are_evaluated_at_the_same_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for several adapters of one coprocessor: the hook begins with each before it waits for any."""
    both, x = threading.Barrier(2), activations(1)
    with session_with(world) as one, session_with(world) as other:
        before(monkeypatch, Evaluator, "evaluate", lambda _: both.wait(IN_VAIN))
        pending = [session.begin(ADAPTER, 0, "qkv", x) for session in (one, other)]
        results = [delta.wait() for delta in pending]
    # The same value twice, under two keys and with two floods.
    assert np.abs(results[0] - results[1]).max() < 0.01 * np.abs(results[0]).max()
    assert not np.array_equal(*results)
