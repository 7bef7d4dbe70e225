"""The host's end of the evaluation stream: one long-lived bidirectional call and one reader thread.

A request costs three thread hand-overs: to gRPC's sending thread, from gRPC to the reader, and to the thread
that waits. On loopback they are nearly all of what a call costs beside arithmetic (docs/protocol-session.md), and lie
inside gRPC; which primitive the waiting thread sleeps on makes no difference that can be measured.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

import grpc

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.errors import TenSafeError, UnavailableError
from tensorguard.observability.metrics import HE_FRAMES
from tensorguard.rpc.status import from_rpc_error
from tensorguard.session import frames
from tensorguard.session.shared_memory import SharedRegion, Slot, SlotAllocator

SESSION_KEY = "tensafe-session-bin"
"""Metadata key that carries the session id of an evaluation stream."""
EVALUATE = "/tensafe.he_lora.v1.HeLoraService/Evaluate"
_MOST_PENDING = 4096

_INLINE, _SHARED = HE_FRAMES.labels("inline"), HE_FRAMES.labels("shared_memory")


Answer: TypeAlias = frames.EvaluationResponse | frames.EvaluationFailure


class Reply:
    """One awaited answer, and the slot of shared memory it may come in. `result` may be called once."""

    __slots__ = ("_box", "slot")

    def __init__(self, slot: Slot | None = None) -> None:
        self.slot = slot
        self._box: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()

    def put(self, answer: Answer | None) -> None:
        """Hand over the answer, or None when there will be none."""
        self._box.put(answer)

    def result(self, timeout: float) -> Answer | None:
        """The answer, or None when the stream broke; queue.Empty when it did not come in time."""
        return self._box.get(timeout=max(0.0, timeout))


class EvaluationStream:
    """Sends request frames and completes replies. Once broken it stays broken: every reply then gets None.

    `memory` is a region that the coprocessor has open too: arrays go there as long as it has room, and inline when
    it has none.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        session_id: bytes,
        parameters: ParameterSet,
        memory: SharedRegion | None = None,
    ) -> None:
        self._parameters = parameters
        self._slots = None if memory is None else SlotAllocator(memory)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._pending: dict[int, Reply] = {}
        self._lock = threading.Lock()
        self._next_id = 1
        self._broken = False
        self._closing = False
        self.bytes_sent = 0
        self.bytes_received = 0
        call = channel.stream_stream(
            EVALUATE, request_serializer=frames.identity, response_deserializer=frames.identity
        )
        self._call = call(self._requests(), metadata=((SESSION_KEY, session_id),))
        self._on_broken: Callable[[TenSafeError], None] = lambda cause: None
        self._reader = threading.Thread(target=self._read, name="he-lora-replies", daemon=True)

    def start(self, on_broken: Callable[[TenSafeError], None]) -> None:
        """Begin to read. `on_broken` is called once, in the reader thread, with the cause: for the log only."""
        self._on_broken = on_broken
        self._reader.start()

    @property
    def broken(self) -> bool:
        """True once no request can be answered any more."""
        return self._broken

    @property
    def pending(self) -> int:
        """Requests that wait for their response."""
        with self._lock:
            return len(self._pending)

    def submit(self, build: Callable[[int, Slot | None], bytes], array_bytes: int) -> Reply:
        """Send the frame that `build` makes for a new request id and perhaps a slot of shared memory.

        Ids grow by one in the order of sending. `array_bytes`: of the arrays of the request or the response, whichever
        are larger. Raises UnavailableError, and what `build` raises.
        """
        with self._lock:
            if self._broken or len(self._pending) >= _MOST_PENDING:
                raise UnavailableError("the evaluation stream is broken or has too many requests in flight")
            request_id = self._next_id
            slot = None if self._slots is None else self._slots.take(array_bytes)
            try:
                message = build(request_id, slot)
            except BaseException:
                self._give_back(slot)
                raise
            self._next_id += 1
            reply = self._pending[request_id] = Reply(slot)
            self._outgoing.put(message)
            self.bytes_sent += frames.carried_bytes(message, self._parameters)
            (_INLINE if slot is None else _SHARED).inc()
        return reply

    def close(self) -> None:
        """End the call; waiting replies get None. Returns at once; `join` waits for the reader."""
        self._closing = True
        self._outgoing.put(None)
        self._call.cancel()
        self._give_up()

    def join(self, timeout: float = 2.0) -> None:
        """Wait until the reader thread has ended."""
        if self._reader.ident is not None and threading.current_thread() is not self._reader:
            self._reader.join(timeout)

    def _requests(self) -> Iterator[bytes]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        cause: TenSafeError = UnavailableError("the coprocessor ended the stream")
        try:
            for message in self._call:
                with self._lock:
                    # The oldest: answers come in order, and one that names another request would be read as its answer.
                    due = next(iter(self._pending), None)
                    reply = None if due is None or frames.answered_request(message) != due else self._pending[due]
                if reply is None:
                    cause = UnavailableError("the coprocessor answered another request than the one that is due")
                    break
                response = frames.read_response(message, self._parameters, reply.slot)
                self.bytes_received += frames.carried_bytes(message, self._parameters)
                with self._lock:
                    self._pending.pop(response.request_id, None)
                    self._give_back(reply.slot)
                    reply.slot = None
                reply.put(response)
        except grpc.RpcError as error:
            cause = from_rpc_error(error)
        except TenSafeError as error:
            cause = error
        self._call.cancel()
        self._outgoing.put(None)
        with self._lock:
            self._broken = True
        if not self._closing:
            # First the key goes, then those who wait hear of it.
            self._on_broken(cause)
        self._give_up()

    def _give_up(self) -> None:
        with self._lock:
            self._broken = True
            waiting = list(self._pending.values())
            self._pending.clear()
            self._slots = None  # the region closes once nobody reads it any more
        for reply in waiting:
            reply.put(None)

    def _give_back(self, slot: Slot | None) -> None:
        if slot is not None and self._slots is not None:
            self._slots.give_back(slot)
