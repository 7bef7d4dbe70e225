"""Which adapters a running engine serves, and how they come and go: the serving process's side.

A name is served by one release at a time. Replacing it is attaching the new release beside the old one, letting new
requests have the new one, and detaching the old one when its last request has ended. A request keeps the release that
it began with, so it never sees a mixture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import structlog

from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.routing import ServedAdapter
from tensorguard.errors import ConfigurationError, InternalError, NotFoundError
from tensorguard.rpc.status import error_of

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.1

WorkerCall = Callable[..., Awaitable[dict[str, Any]]]
"""Calls a `tensafe_...` method of the worker by name."""
OnDetached = Callable[[ServedAdapter], Awaitable[None]]
"""Told of a release that the worker has forgotten."""

T = TypeVar("T")


class AdapterRegistry:
    """Adapters by name. Lives in one event loop; changes are made one at a time and finish even if the caller that
    asked for them is cancelled."""

    def __init__(self, call: WorkerCall, base_name: str, on_detached: OnDetached) -> None:
        self._call = call
        self._on_detached = on_detached
        self._base_name = base_name
        self._adapters: dict[str, ServedAdapter] = {}
        self._epochs: dict[str, int] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def served(self) -> Mapping[str, ServedAdapter]:
        """What new requests get, by name."""
        return MappingProxyType(self._adapters)

    def get(self, name: str) -> ServedAdapter:
        """Raises NotFoundError."""
        if name not in self._adapters:
            raise NotFoundError(f"there is no adapter {name!r} here; there are: {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    async def add(self, connection: AdapterConnection) -> ServedAdapter:
        """Serve an adapter, in place of the release that is served under its name, if there is one.

        Returns when new requests get it; requests that run finish on the old release, which is then detached. Raises
        the TenSafeError that kept it from being attached; what was served is then served as before.
        """
        return await self._finish(self._add(connection))

    async def remove(self, name: str) -> None:
        """No longer serve an adapter. Returns when its running requests have ended and its keys are destroyed.

        Raises NotFoundError.
        """
        self.get(name)
        await self._finish(self._retire(self._adapters.pop(name)))

    def close(self) -> None:
        """Give up on changes under way: the worker is going. May be called from any thread."""
        for task in tuple(self._tasks):
            if not (loop := task.get_loop()).is_closed():
                loop.call_soon_threadsafe(task.cancel)

    async def _add(self, connection: AdapterConnection) -> ServedAdapter:
        name = connection.name
        if name == self._base_name:
            raise ConfigurationError(f"an adapter needs a name other than the base model's, {name!r}")
        async with self._changing:
            attached = await self._attach(connection)
            fresh = ServedAdapter(
                attached["name"], attached["digest"], attached["sequence"], self._epochs.get(attached["digest"], 0)
            )
            replaced = self._adapters.get(name)
            self._adapters[name] = fresh
        log.info("adapter_attached", adapter=name, sequence=fresh.sequence, replaced=replaced is not None)
        if replaced is not None:
            self._start(self._retire(replaced))
        return fresh

    async def _attach(self, connection: AdapterConnection) -> dict[str, Any]:
        ticket = (await self._call("tensafe_attach", connection.model_dump(mode="json")))["ticket"]
        while True:
            answer = raised(await self._call("tensafe_attach_outcome", ticket))
            if answer["adapter"] is not None:
                return dict(answer["adapter"])
            await asyncio.sleep(POLL_SECONDS)

    async def _retire(self, adapter: ServedAdapter) -> None:
        await adapter.retire()
        # The release may come back, and find the blocks of then in the prefix cache.
        self._epochs[adapter.digest] = adapter.epoch
        raised(await self._call("tensafe_detach", adapter.key))
        await self._on_detached(adapter)
        log.info("adapter_detached", adapter=adapter.name, sequence=adapter.sequence)

    async def _finish(self, change: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._start(change))

    def _start(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Also marks the error as seen where nobody waits for the change any more.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("adapter_not_changed", reason=getattr(error, "reason", type(error).__name__))


def raised(answer: dict[str, Any]) -> dict[str, Any]:
    """A worker's answer, or the error in it, raised as what it was."""
    if (error := answer.get("error")) is not None:
        raise error_of(error["reason"], error["message"]) or InternalError(error["message"])
    return answer
