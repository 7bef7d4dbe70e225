"""The adapters of one worker: connected in the background, put into the hooks between two steps.

Attestation and fetching a basis take seconds, so `begin` starts a thread for them and returns. Whoever asks for
the `outcome` next, between two steps, also swaps the finished adapter in: nothing changes during a step, and under
tensor parallelism all ranks change in the same one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import structlog

from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.install import AttachedGroup, Attachment, FittedAdapter, Hooks
from tensorguard.errors import InternalError, InvalidInputError, NotFoundError, TenSafeError
from tensorguard.observability.logging import frames_of

log = structlog.get_logger(__name__)


class Connected(Protocol):
    """An adapter whose coprocessor answers (`connect.ConnectedAdapter`)."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def sequence(self) -> int: ...

    @property
    def attachment(self) -> Attachment: ...

    def status(self) -> dict[str, Any]:
        """Numbers for status pages."""
        ...

    def close(self) -> None:
        """End the session and destroy its keys."""
        ...


class Connects(Protocol):
    """Opens sessions (`connect.Connector`)."""

    @property
    def evidence_kind(self) -> str: ...

    def connect(self, connection: AdapterConnection) -> Connected:
        """Raises the TenSafeError that says what to change."""
        ...


class Attachments:
    """Adapters by key. All methods are called between two steps, from the worker's own thread."""

    def __init__(
        self, connector: Connects, hooks: Hooks, prepare: Callable[[Attachment], Attachment] = lambda given: given
    ) -> None:
        """prepare: what to do with a connected adapter before it is put into the hooks."""
        self._connector = connector
        self._hooks = hooks
        self._prepare = prepare
        self._adapters: dict[str, Connected] = {}
        self._attempts: dict[int, Future[tuple[Connected, FittedAdapter]]] = {}
        self._tickets = itertools.count(1)

    def begin(self, connection: AdapterConnection) -> int:
        """Start to attach an adapter; the number is what to ask `outcome` for."""
        ticket, attempt = next(self._tickets), Future[tuple[Connected, FittedAdapter]]()
        self._attempts[ticket] = attempt
        threading.Thread(target=self._connect, args=(connection, attempt), name="he-lora-attach", daemon=True).start()
        return ticket

    def outcome(self, ticket: int) -> dict[str, Any] | None:
        """None while the attempt is under way. Once: the adapter's key, name, digest and sequence, after which it is
        computed.

        Raises what kept the adapter from being attached, and InvalidInputError where that release is attached already;
        everything is then as it was.
        """
        attempt = self._attempts.get(ticket)
        if attempt is None:
            raise NotFoundError(f"there is no attempt {ticket} to attach an adapter")
        if not attempt.done():
            return None
        del self._attempts[ticket]
        adapter, fitted = attempt.result()
        if fitted.key in self._adapters:
            adapter.close()
            raise InvalidInputError(
                f"this release of adapter {adapter.name!r} (manifest {adapter.digest[:16]}...) is attached already; "
                "detach it first to attach it anew"
            )
        self._adapters[fitted.key] = adapter
        self._hooks.add(fitted)
        return _described(fitted.key, adapter)

    def groups(self, key: str) -> tuple[AttachedGroup, ...]:
        """The shapes and bases of an adapter that is attached."""
        return self._adapters[key].attachment.groups

    def detach(self, key: str) -> None:
        """Stop computing an adapter, end its session and destroy its keys. Raises NotFoundError."""
        adapter = self._adapters.pop(key, None)
        if adapter is None:
            raise NotFoundError(f"there is no adapter {key!r} attached here")
        self._hooks.remove(key)
        adapter.close()

    def status(self) -> dict[str, Any]:
        """The host's evidence kind, and per adapter its description and its session's numbers."""
        return {
            "evidence_kind": self._connector.evidence_kind,
            "adapters": [_described(key, adapter) | adapter.status() for key, adapter in self._adapters.items()],
        }

    def close(self) -> None:
        """Detach everything; attempts under way close themselves."""
        for attempt in self._attempts.values():
            attempt.add_done_callback(_close_late)
        self._attempts.clear()
        for key in list(self._adapters):
            self.detach(key)

    def _connect(self, connection: AdapterConnection, attempt: Future[tuple[Connected, FittedAdapter]]) -> None:
        try:
            adapter = self._connector.connect(connection)
            try:
                fitted = self._hooks.fit(self._prepare(adapter.attachment))
            except BaseException:
                adapter.close()
                raise
        except TenSafeError as error:
            attempt.set_exception(error)
        except BaseException as error:
            log.error("attach_failed", error_type=type(error).__name__, frames=frames_of(error))
            attempt.set_exception(InternalError("attaching the adapter failed; the engine's log has the details"))
        else:
            attempt.set_result((adapter, fitted))


def _close_late(attempt: Future[tuple[Connected, FittedAdapter]]) -> None:
    if attempt.exception() is None:
        attempt.result()[0].close()


def _described(key: str, adapter: Connected) -> dict[str, Any]:
    return {"key": key, "name": adapter.name, "digest": adapter.digest, "sequence": adapter.sequence}
