"""Both readers of shared memory, with the fuzzer in the place of their peer: references, bytes, and when they change.

    input = side u8, steps...         side even: the coprocessor, which a host asks; odd: a host, whom it answers
    step  = operation u8, length u8, arguments of that length
            0 send a message          edits of a well-formed one, most of them with references (fuzz.edits)
            1 put                     position u24, then edits of the arrays of a message
            2 put, in the next read   after how many bytes of it u24, then as in 1
            3 cut                     length u24: the region is that short from now on
            4 cut, in the next read   after how many bytes of it u24, then as in 3

Whatever is accepted must be exactly what one read gave: that one is torn, so a second would give something else.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.coprocessor import FuzzedCoprocessor, check_reasons, fuzzed_world
from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.shared_region import FuzzedRegion, pages
from fuzz.target import Target
from tensorguard.ckks.evaluator import Evaluator
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.packing import pack
from tensorguard.ckks.plan import Plan
from tensorguard.session import frames
from tensorguard.session.shared_memory import Slot
from tensorguard.session.stream import EvaluationStream, Reply
from tests.support.coprocessor import World
from tests.support.raw_host import PARAMETERS, RawHost

FACTOR, ALLOWANCE = 32, 16 * 1024 * 1024
SLOT_PAGES, SLOTS = 16, 3
"""A request of one ciphertext fills 12 pages; three are in flight at most."""
REPLY_SECONDS = 10.0
POSITION_BYTES = 3


@contextmanager
def shared_memory_target(folder: Path) -> Iterator[Target]:
    """On a coprocessor of its own."""
    with fuzzed_world(folder) as world:
        yield world_target(world)


def world_target(world: World) -> Target:
    """On a coprocessor that runs."""
    sides = (_AsHost(world), _AsCoprocessor())

    def run(data: bytes) -> None:
        if data:
            sides[data[0] % 2].run(data[1:])

    return Target("shared_memory", [bytes([i]) + seed for i in (0, 1) for seed in _seeds()], run)


def _seeds() -> Iterator[bytes]:
    def step(operation: int, *numbers: int, edits: bytes = b"") -> bytes:
        arguments = b"".join(number.to_bytes(POSITION_BYTES, "little") for number in numbers) + edits
        return bytes([operation, len(arguments)]) + arguments

    first, second, third = (step(0, edits=bytes([number])) for number in range(SLOTS))
    slot = pages(SLOT_PAGES)
    yield first + second + third
    yield first + first + step(0, edits=b"\x03")
    yield step(1, slot, edits=b"\0") + second + step(3, slot + 100) + first + third
    yield step(2, 20, 0, edits=b"\x01") + first + step(2, 40, slot, edits=b"\x03" + bytes(200)) + second
    yield step(4, 1000, 0) + first + second + step(4, 0, 2 * slot) + third


class _Side:
    """What both sides have in common: a region, well-formed messages and their arrays, and the steps."""

    def __init__(self) -> None:
        self.region = FuzzedRegion(pages(SLOT_PAGES * (SLOTS + 1)))
        self.messages: list[bytes] = []
        self.arrays: list[bytes] = []
        self.image = b""

    def slot(self, number: int) -> Slot:
        """The place of a message's arrays, as the fuzzer sees it."""
        return self.region.ours.slot(pages(SLOT_PAGES * number), pages(SLOT_PAGES))

    def keep(self, messages: Iterable[bytes]) -> None:
        """Take messages whose arrays have just been put into the region, in the order of the slots."""
        self.messages = list(messages)
        self.image = self.region.ours.read(0, self.region.size).tobytes()
        parts = [self.slot(number) for number in range(SLOTS)]
        self.arrays = [self.image[part.offset : part.offset + part.length] for part in parts]

    def run(self, data: bytes) -> None:
        """One input."""
        self.region.restore(self.image)
        with self.region.watched(), bounded_memory(self.region.size + len(data), FACTOR, ALLOWANCE):
            self.exchange(self.sent(data))

    def exchange(self, messages: Iterator[bytes]) -> None:
        """Let the side under test read the messages, and check what it makes of them."""
        raise NotImplementedError

    def sent(self, data: bytes) -> Iterator[bytes]:
        """The messages of an input; between them the region changes."""
        position = 0
        while position + 2 <= len(data):
            operation, length = data[position] % 5, data[position + 1]
            position += 2 + length
            arguments = data[position - length : position]
            if operation == 0:
                self.region.forget()
                yield message_from(arguments, self.messages)
                continue
            change = self.put if operation in (1, 2) else self.cut
            if operation in (1, 3):
                change(arguments)
            else:
                self.region.during_next_read(_number(arguments), partial(change, arguments[POSITION_BYTES:]))

    def put(self, arguments: bytes) -> None:
        self.region.put(_number(arguments) % self.region.size, message_from(arguments[POSITION_BYTES:], self.arrays))

    def cut(self, arguments: bytes) -> None:
        self.region.cut(_number(arguments) % (self.region.size + 1))

    def check_copy(self, message: bytes, *arrays: Any) -> None:
        """The arrays that a message's reader works on: from one copy of the region, or from the message."""
        accepted = b"".join(bytes(memoryview(array).cast("B")) for array in arrays)
        if frames.carried_bytes(message, PARAMETERS) > len(message):
            assert self.region.copies == [accepted], f"not what one read gave, of {len(self.region.copies)}"
        else:
            assert not self.region.copies and message.endswith(accepted)


def _number(arguments: bytes) -> int:
    return int.from_bytes(arguments[:POSITION_BYTES], "little")


class _AsHost(_Side):
    """The fuzzer is the host."""

    def __init__(self, world: World) -> None:
        super().__init__()
        with RawHost(world) as host:
            host.begin()
            host.complete()
            host.attach()
            self._coprocessor = FuzzedCoprocessor(world, host)
            requests = [host.request(tokens)[0] for tokens in (1, 3, 1)]
        requests = [dataclasses.replace(request, slot=self.slot(i)) for i, request in enumerate(requests)]
        inline = dataclasses.replace(requests[0], request_id=SLOTS + 1, slot=None)
        self.keep(frames.write_request(request) for request in (*requests, inline))
        self._message = b""

    def exchange(self, messages: Iterator[bytes]) -> None:
        session = self._coprocessor.open_session(self.region.theirs, lambda evaluator: _Checking(evaluator, self))
        try:
            for answer in self._coprocessor.evaluate(self._remembered(messages)):
                self._check_answer(answer)
        finally:
            self._coprocessor.registry.remove(self._coprocessor.transcript.session_id)
        check_reasons(session)

    def _remembered(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for self._message in messages:
            yield self._message

    def check_request(self, ids: Any, seeds: bytes, b: Any) -> None:
        self.check_copy(self._message, ids, seeds, pack(b))

    def _check_answer(self, answer: bytes) -> None:
        """It can be read by an honest host, and nothing was written beside the slot that the request named."""
        slot = None
        if self.region.copies:
            offset, length = (int.from_bytes(part, "little") for part in (self._message[-16:-8], self._message[-8:]))
            slot = Slot(self.region.ours, offset, length)
        for first, end in self.region.written:
            inside = slot is not None and slot.offset <= first <= end <= slot.offset + slot.length
            assert inside, "bytes were written beside the slot"
        frames.read_response(answer, PARAMETERS, slot)


class _Checking:
    """An evaluator that looks at what it is given, before it evaluates and after that."""

    def __init__(self, evaluator: Evaluator, side: _AsHost) -> None:
        self._evaluator, self._side = evaluator, side
        self.counters = evaluator.counters
        self.close = evaluator.close

    def evaluate(self, group: Any, plan: Plan, tokens: int, ids: Any, seeds: bytes, b: Any) -> EvaluatedRows:
        self._side.check_request(ids, seeds, b)
        rows = self._evaluator.evaluate(group, plan, tokens, ids, seeds, b)
        self._side.check_request(ids, seeds, b)
        return rows


class _AsCoprocessor(_Side):
    """The fuzzer is the coprocessor, at the other end of a channel that carries nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = np.random.default_rng(5)
        responses = [
            frames.EvaluationResponse(
                request_id=number + 1,
                c1=generator.integers(0, 2**29, (1 + number, PARAMETERS.degree), np.uint32),
                c0=generator.integers(0, 2**29, (1 + number, 12), np.uint32),
                evaluate_ns=5,
                counts=frames.OperationCounts(1, 2, 3, 4, 5),
            )
            for number in range(SLOTS)
        ]
        written = [frames.write_response(response, self.slot(i)) for i, response in enumerate(responses)]
        self.keep([*written, frames.write_response(responses[0]), frames.write_failure(2)])

    def exchange(self, messages: Iterator[bytes]) -> None:
        call = _Call(messages, self._check_replies)
        stream = EvaluationStream(_Channel(call), b"session", PARAMETERS, self.region.theirs)
        self._replies = [stream.submit(_unsent, pages(SLOT_PAGES)) for _ in range(SLOTS)]
        stream.start(lambda cause: None)
        stream.join(REPLY_SECONDS)
        ended = stream.broken
        stream.close()
        if call.failure is not None:
            raise call.failure
        assert ended, "the reader stopped and told nobody; its exception is in the output"
        assert all(reply.result(0) is None for reply in self._replies)

    def _check_replies(self, message: bytes) -> None:
        """After the reader is done with a message."""
        waiting: list[Reply] = []
        for reply in self._replies:
            try:
                response = reply.result(0)
            except queue.Empty:
                waiting.append(reply)
                continue
            if response is not None:
                assert response.request_id == frames.answered_request(message)
                self.check_copy(message, pack(response.c1), np.ascontiguousarray(response.c0))
        assert len(waiting) >= len(self._replies) - 1, "one message, several replies"
        self._replies = waiting


def _unsent(request_id: int, slot: Slot | None) -> bytes:
    """In the place of a request, which nobody would read."""
    return frames.write_failure(request_id)


class _Call:
    """Of the evaluation stream, as far as the host uses it. Checks after each message, and keeps what was found."""

    def __init__(self, messages: Iterator[bytes], check: Callable[[bytes], None]) -> None:
        self._messages, self._check = messages, check
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            for message in self._messages:
                yield message
                self._check(message)
        except Exception as error:
            self.failure = error

    def cancel(self) -> None:
        pass


class _Channel:
    """Makes that call."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def stream_stream(self, method: str, **_: Any) -> Callable[..., _Call]:
        return lambda requests, metadata: self._call
