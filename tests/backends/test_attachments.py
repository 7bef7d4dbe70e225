"""The worker's adapters: connected in a thread, swapped in by whoever asks, refused without a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tensorguard.backends.vllm.attachments import Attachments
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.install import Attachment, FittedAdapter
from tensorguard.backends.vllm.rows import adapter_key
from tensorguard.errors import (
    InternalError,
    InvalidInputError,
    NotFoundError,
    PackageError,
    TenSafeError,
    UnsupportedAdapterError,
)


def connection(name: str = "red") -> AdapterConnection:
    return AdapterConnection(
        name=name, coprocessor_endpoint="c:1", attestor_endpoint="a:1", publisher_keys=(Path("k"),)
    )


@dataclass
class Adapter:
    name: str
    digest: str
    sequence: int = 1
    closed: int = 0

    @property
    def attachment(self) -> Attachment:
        return Attachment(adapter_key(self.name, self.digest), (), source=None)  # type: ignore[arg-type]

    def status(self) -> dict[str, Any]:
        return {"calls": 3}

    def close(self) -> None:
        self.closed += 1


@dataclass
class Connector:
    """Gives out adapters with `digest`, after `go`."""

    evidence_kind: str = "simulated"
    digest: str = "ab" * 32
    error: Exception | None = None
    go: threading.Event = field(default_factory=threading.Event)
    made: list[Adapter] = field(default_factory=list)

    def connect(self, connection: AdapterConnection) -> Adapter:
        assert self.go.wait(10)
        if self.error:
            raise self.error
        self.made.append(Adapter(connection.name, self.digest))
        return self.made[-1]


@dataclass
class Hooks:
    events: list[str] = field(default_factory=list)
    refuse: bool = False

    def fit(self, attachment: Attachment) -> FittedAdapter:
        if self.refuse:
            raise UnsupportedAdapterError("no such layer")
        return FittedAdapter(attachment.key, {}, attachment.source)

    def add(self, adapter: FittedAdapter) -> None:
        self.events.append(f"add {adapter.key}")

    def remove(self, key: str) -> None:
        self.events.append(f"remove {key}")


class Bench:
    def __init__(self) -> None:
        self.connector, self.hooks = Connector(), Hooks()
        self.attachments = Attachments(self.connector, self.hooks)  # type: ignore[arg-type]

    def outcome(self, ticket: int) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if (outcome := self.attachments.outcome(ticket)) is not None:
                return outcome
            time.sleep(0.01)
        raise AssertionError("the attempt did not end")

    def attach(self, name: str = "red") -> dict[str, Any]:
        self.connector.go.set()
        return self.outcome(self.attachments.begin(connection(name)))


KEY = "red@" + "ab" * 8


def test_nothing_waits_and_nothing_changes_until_the_outcome_is_asked_for() -> None:
    bench = Bench()
    ticket = bench.attachments.begin(connection())
    assert bench.attachments.outcome(ticket) is None
    bench.connector.go.set()
    deadline = time.monotonic() + 10
    while not bench.attachments._attempts[ticket].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bench.hooks.events == []
    assert bench.attachments.outcome(ticket) == {"key": KEY, "name": "red", "digest": "ab" * 32, "sequence": 1}
    assert bench.hooks.events == [f"add {KEY}"]
    with pytest.raises(NotFoundError):
        bench.attachments.outcome(ticket)


def test_status_lists_what_is_attached() -> None:
    bench = Bench()
    assert bench.attachments.status() == {"evidence_kind": "simulated", "adapters": []}
    bench.attach()
    (adapter,) = bench.attachments.status()["adapters"]
    assert (adapter["key"], adapter["name"], adapter["calls"]) == (KEY, "red", 3)


def test_detaching_takes_the_adapter_out_before_its_keys_go() -> None:
    bench = Bench()
    bench.attach()
    bench.connector.made[0].close = lambda: bench.hooks.events.append("close")  # type: ignore[method-assign]
    bench.attachments.detach(KEY)
    assert bench.hooks.events[1:] == [f"remove {KEY}", "close"]
    assert bench.attachments.status()["adapters"] == []
    with pytest.raises(NotFoundError, match="red"):
        bench.attachments.detach(KEY)


@pytest.mark.parametrize(
    ("error", "raised"), [(PackageError("another release"), PackageError), (ValueError("a defect"), InternalError)]
)
def test_what_keeps_an_adapter_away_is_raised_once(error: Exception, raised: type[TenSafeError]) -> None:
    bench = Bench()
    bench.connector.error = error
    with pytest.raises(raised) as caught:
        bench.attach()
    assert ("another release" in caught.value.message) is (raised is PackageError)
    assert bench.hooks.events == [] and bench.attachments.status()["adapters"] == []


def test_an_adapter_that_does_not_fit_is_closed_again() -> None:
    bench = Bench()
    bench.hooks.refuse = True
    with pytest.raises(UnsupportedAdapterError):
        bench.attach()
    assert bench.connector.made[0].closed == 1
    assert bench.hooks.events == []


def test_a_release_that_is_attached_already_stays_as_it_is() -> None:
    bench = Bench()
    bench.attach()
    with pytest.raises(InvalidInputError, match="attached already"):
        bench.attach()
    first, second = bench.connector.made
    assert (first.closed, second.closed) == (0, 1)
    assert bench.hooks.events == [f"add {KEY}"]
    bench.connector.digest = "cd" * 32
    assert bench.attach()["key"] == "red@" + "cd" * 8


def test_closing_ends_every_session_also_one_that_is_still_being_opened() -> None:
    bench = Bench()
    bench.attach()
    bench.connector.go.clear()
    bench.attachments.begin(connection("blue"))
    bench.attachments.close()
    bench.connector.go.set()
    deadline = time.monotonic() + 10
    while len(bench.connector.made) < 2 or not bench.connector.made[1].closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [adapter.closed for adapter in bench.connector.made] == [1, 1]
    assert f"add blue@{'ab' * 8}" not in bench.hooks.events
