"""The thread that brings a session back outlives whatever keeps it from doing so."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tensorguard.backends.vllm import connect
from tensorguard.backends.vllm.connect import SessionKeeper
from tensorguard.errors import DeltaUnavailableError


class Session:
    """Fails as told; what is left of `errors` when it is open."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.opened = threading.Event()

    def ensure_open(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.opened.set()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CHECK_SECONDS", 0.001)


@pytest.mark.parametrize("error", [DeltaUnavailableError("no session"), RuntimeError("a defect"), OSError("no memory")])
def test_it_tries_until_the_session_is_open(error: Exception) -> None:
    session: Any = Session(error, error, error)
    keeper = SessionKeeper(session)
    try:
        assert session.opened.wait(10)
    finally:
        keeper.close()


def test_it_stops() -> None:
    session: Any = Session()
    keeper = SessionKeeper(session)
    assert session.opened.wait(10)
    keeper.close()
    keeper._thread.join(10)
    assert not keeper._thread.is_alive()
