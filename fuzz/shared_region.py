"""A real shared region with the fuzzer at one side of it, changing bytes at any time, also while they are read.

The other side reads with `preadv` (tensorguard/session/shared_memory.py). A change may wait for that call and come in
the middle of it: what the reader gets is old up to there and new behind it. Then nothing can be read a second time and
still agree with the first, so whoever does not work on its one copy is found.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from tensorguard.session.shared_memory import PAGE, SharedRegion, offer_region, open_offered_region

_preadv, _pwritev = os.preadv, os.pwritev


class FuzzedRegion:
    """`size` bytes. `theirs` is open at the side under test, `ours` at the fuzzer's."""

    def __init__(self, size: int) -> None:
        offered = offer_region(size)
        try:
            self.theirs, _ = open_offered_region(offered.name, size, size)
        finally:
            offered.withdraw()
        self.ours: SharedRegion = offered.region
        self.size = size
        self.copies: list[bytes] = []
        """What the other side's reads gave it, since `forget`."""
        self.written: list[tuple[int, int]] = []
        """First byte and end of the other side's writes, since `forget`."""
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def forget(self) -> None:
        """What was read and written so far."""
        self.copies.clear()
        self.written.clear()

    def restore(self, image: bytes) -> None:
        """Full size, with `image` at its beginning and zeros behind, and no change waits."""
        self._waiting.clear()
        self.forget()
        os.ftruncate(self.ours._descriptor, 0)
        os.ftruncate(self.ours._descriptor, self.size)
        self.ours.write(0, image)

    def put(self, position: int, data: bytes) -> None:
        """Overwrite as much of the region as there is from a position."""
        self.ours.write(position, data[: self.size - position])

    def cut(self, length: int) -> None:
        """Truncate it behind the back of the other side."""
        os.ftruncate(self.ours._descriptor, length)

    def during_next_read(self, position: int, change: Callable[[], None]) -> None:
        """Let the other side's next read pause after so many bytes (modulo its length), for a change."""
        self._waiting.append((position, change))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Reads and writes of the other side come by here."""
        with mock.patch.multiple(os, preadv=self._read, pwritev=self._write):
            yield

    def _read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor != self.theirs._descriptor:
            return _preadv(descriptor, buffers, offset)
        (buffer,) = buffers
        done = 0
        if self._waiting:
            position, change = self._waiting.popleft()
            first = position % (len(buffer) + 1)
            done = _preadv(descriptor, [buffer[:first]], offset)
            change()
            if done < first:
                return done
        done += _preadv(descriptor, [buffer[done:]], offset + done)
        self.copies.append(bytes(buffer[:done]))
        return done

    def _write(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        done = _pwritev(descriptor, buffers, offset)
        if descriptor == self.theirs._descriptor:
            self.written.append((offset, offset + done))
        return done


def pages(number: int) -> int:
    """Bytes of so many pages."""
    return number * PAGE
