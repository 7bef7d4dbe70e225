"""Adapters come, go and are replaced while requests run; no request sees two releases."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tensorguard.backends.vllm import registry
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.registry import AdapterRegistry
from tensorguard.backends.vllm.routing import ServedAdapter
from tensorguard.backends.vllm.rows import adapter_key
from tensorguard.errors import ConfigurationError, NotFoundError, PackageError


def connection(name: str = "red") -> AdapterConnection:
    return AdapterConnection(
        name=name, coprocessor_endpoint="c:1", attestor_endpoint="a:1", publisher_keys=(Path("k"),)
    )


class Worker:
    """Attaches what it is told at the third question; `digest` is what the coprocessor serves at the moment."""

    def __init__(self) -> None:
        self.digest = "01" * 32
        self.refuses = False
        self.attached: list[str] = []
        self.waiting: dict[int, tuple[str, int]] = {}
        self.questions = 3

    async def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if method == "tensafe_attach":
            (given,) = arguments
            self.waiting[len(self.waiting) + 1] = (given["name"], self.questions)
            return {"ticket": len(self.waiting)}
        if method == "tensafe_attach_outcome":
            name, left = self.waiting[arguments[0]]
            self.waiting[arguments[0]] = (name, left - 1)
            if left > 1:
                return {"adapter": None}
            if self.refuses:
                return {"error": {"reason": "package", "message": "another release"}}
            key = adapter_key(name, self.digest)
            self.attached.append(key)
            return {"adapter": {"key": key, "name": name, "digest": self.digest, "sequence": 1}}
        assert method == "tensafe_detach"
        self.attached.remove(arguments[0])
        return {}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.001)


class Bench:
    def __init__(self) -> None:
        self.worker = Worker()
        self.detached: list[str] = []
        self.registry = AdapterRegistry(self.worker.call, "base", self.note)

    async def note(self, adapter: ServedAdapter) -> None:
        assert adapter.key not in self.worker.attached
        self.detached.append(adapter.key)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0.001)


OLD, NEW = "red@" + "01" * 8, "red@" + "02" * 8


async def test_an_adapter_comes_and_goes() -> None:
    bench = Bench()
    served = await bench.registry.add(connection())
    assert bench.registry.served == {"red": served}
    assert bench.registry.get("red") is served
    assert (served.key, bench.worker.attached) == (OLD, [OLD])
    await bench.registry.remove("red")
    assert bench.worker.attached == []
    for unknown in (bench.registry.get, bench.registry.remove):
        with pytest.raises(NotFoundError, match="'red'"):
            answer = unknown("red")
            assert asyncio.iscoroutine(answer)
            await answer


async def test_a_replaced_release_serves_its_own_requests_to_their_end() -> None:
    bench = Bench()
    old = await bench.registry.add(connection())
    with old.held():
        bench.worker.digest = "02" * 32
        new = await bench.registry.add(connection())
        assert bench.registry.get("red") is new
        assert bench.worker.attached == [OLD, NEW]
        with old.held():  # the same request asks again, as beam search does
            pass
        await bench.settle()
        assert bench.worker.attached == [OLD, NEW], "the old release went while a request was on it"
    await bench.settle()
    assert bench.worker.attached == [NEW]
    assert bench.detached == [OLD]
    with pytest.raises(NotFoundError, match="no longer served"), old.held():
        pass


async def test_removing_waits_for_the_requests_that_run_and_takes_no_new_ones() -> None:
    bench = Bench()
    served = await bench.registry.add(connection())
    with served.held():
        removing = asyncio.create_task(bench.registry.remove("red"))
        await bench.settle()
        assert not removing.done()
        assert "red" not in bench.registry.served
        assert bench.worker.attached == [OLD]
    await removing
    assert bench.worker.attached == []


async def test_a_refused_release_changes_nothing() -> None:
    bench = Bench()
    old = await bench.registry.add(connection())
    bench.worker.digest, bench.worker.refuses = "02" * 32, True
    with pytest.raises(PackageError, match="another release"):
        await bench.registry.add(connection())
    await bench.settle()
    assert bench.registry.get("red") is old
    assert bench.worker.attached == [OLD]
    with old.held():
        pass


async def test_the_base_models_name_is_taken() -> None:
    bench = Bench()
    with pytest.raises(ConfigurationError, match="'base'"):
        await bench.registry.add(connection("base"))
    assert not bench.worker.waiting


async def test_a_change_is_finished_without_the_caller_that_asked_for_it() -> None:
    bench = Bench()
    bench.worker.questions = 20
    asking = asyncio.create_task(bench.registry.add(connection()))
    await asyncio.sleep(0.005)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert bench.registry.served == {}
    await bench.settle()
    assert list(bench.registry.served) == ["red"]


async def test_two_replacements_at_once_leave_one_release() -> None:
    bench = Bench()
    await bench.registry.add(connection())

    async def replace(digest: str) -> None:
        bench.worker.digest = digest
        await bench.registry.add(connection())

    await replace("02" * 32)
    await asyncio.gather(replace("03" * 32), bench.registry.add(connection("blue")))
    await bench.settle()
    assert sorted(bench.worker.attached) == sorted(a.key for a in bench.registry.served.values())
    assert sorted(bench.registry.served) == ["blue", "red"]


async def test_a_release_that_comes_back_does_not_reuse_the_blocks_of_before_a_failure() -> None:
    bench = Bench()
    served = await bench.registry.add(connection())
    served.epoch += 1
    before = {f"tensafe:{served.digest}:{epoch}" for epoch in range(served.epoch)}
    await bench.registry.remove("red")
    again = await bench.registry.add(connection())
    assert again.digest == served.digest
    assert again.cache_salt not in before
