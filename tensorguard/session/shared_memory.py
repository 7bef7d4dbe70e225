"""A region of shared memory between a host and a coprocessor on one machine, for the arrays of frames.

The host makes the region, opens it to the coprocessor by a random name for the moment of the negotiation, and takes
the name away: what is left is a file descriptor on each side, so nothing outlives the two processes. The host alone
hands out slots. Whoever reads a slot copies it into its own memory with one system call and looks only at the copy:
the peer cannot change what was checked, and a peer that truncates the region causes a short read, not the SIGBUS that
a mapping would.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorguard.errors import InvalidInputError, UnavailableError

FOLDER = Path("/dev/shm")  # noqa: S108 - names in it are random, and O_EXCL and O_NOFOLLOW guard them
CHALLENGE_BYTES = 32
PAGE = 4096
MAX_BYTES = 1 << 30

_NAME = re.compile(r"tensafe-[0-9a-f]{32}")
_MODE = 0o600
# The name is taken as it is, never followed, and opening does not wait for the other end of a pipe.
_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

Buffer = Any  # bytes, memoryview or a C-contiguous array


class SharedRegion:
    """An open region of `size` bytes. It is closed when nobody refers to it: calls that run keep it open."""

    __slots__ = ("__weakref__", "_descriptor", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        """Takes over the descriptor."""
        self._descriptor, self.size = descriptor, size
        # At exit the system closes it, after the threads that may still read.
        weakref.finalize(self, os.close, descriptor).atexit = False

    def slot(self, offset: int, length: int) -> Slot:
        """The slot that a peer refers to. Raises InvalidInputError for a range outside the region."""
        self._check(offset, length)
        return Slot(self, offset, length)

    def read(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """A private copy, uint8 [length]. Raises InvalidInputError for a range outside the region."""
        self._check(offset, length)
        copy = np.empty(length, np.uint8)
        if os.preadv(self._descriptor, [copy.data], offset) != length:
            raise InvalidInputError("the shared memory is shorter than was agreed")
        return copy

    def write(self, offset: int, *arrays: Buffer) -> None:
        """Put arrays one after the other. Raises InvalidInputError for a range outside, UnavailableError."""
        views = [memoryview(array).cast("B") for array in arrays]
        length = sum(view.nbytes for view in views)
        self._check(offset, length)
        try:
            written = os.pwritev(self._descriptor, views, offset)
        except OSError as error:
            raise UnavailableError(f"the shared memory cannot be written ({error.strerror})") from None
        if written != length:
            raise UnavailableError("the shared memory is full")

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InvalidInputError("a reference to outside of the shared memory")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A part of a region, for one request and then for the response to it."""

    region: SharedRegion
    offset: int
    length: int

    def read(self, length: int) -> npt.NDArray[np.uint8]:
        """A private copy of the first bytes. Raises InvalidInputError when they are more than the slot has."""
        if length > self.length:
            raise InvalidInputError("a reference to more than its slot of the shared memory")
        return self.region.read(self.offset, length)

    def write(self, *arrays: Buffer) -> None:
        """Put arrays at the beginning. The caller has compared their size with the slot's."""
        self.region.write(self.offset, *arrays)


class SlotAllocator:
    """Hands out slots of a region: whole pages, first fit, never two that overlap. The caller has a lock."""

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._free = [(0, region.size)]
        self._taken: dict[int, int] = {}

    def take(self, length: int) -> Slot | None:
        """A slot of at least this many bytes, or None while there is no room."""
        wanted = -(-max(length, 1) // PAGE) * PAGE
        for index, (start, size) in enumerate(self._free):
            if size >= wanted:
                self._free[index : index + 1] = [(start + wanted, size - wanted)] if size > wanted else []
                self._taken[start] = wanted
                return Slot(self._region, start, wanted)
        return None

    def give_back(self, slot: Slot) -> None:
        """The slot may be handed out again. Once for each slot."""
        length = self._taken.pop(slot.offset)
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self._free, (slot.offset, length)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged


class OfferedRegion:
    """A region that still has its name, and the challenge in it. `withdraw` takes the name away."""

    __slots__ = ("challenge", "name", "region")

    def __init__(self, name: str, region: SharedRegion, challenge: bytes) -> None:
        self.name, self.region, self.challenge = name, region, challenge

    def withdraw(self) -> None:
        """Remove the name. The region lives on where it is open."""
        _remove(self.name)


def offer_region(size: int) -> OfferedRegion:
    """Make a region of `size` bytes, a multiple of the page, that begins with a random challenge.

    Its memory is reserved now, so that later writes do not fail. Raises InvalidInputError for an impossible size and
    UnavailableError when there is no such memory.
    """
    if not PAGE <= size <= MAX_BYTES or size % PAGE:
        raise InvalidInputError(f"shared memory has {PAGE} to {MAX_BYTES} bytes, whole pages of {PAGE}")
    sweep_abandoned_regions()
    name = f"tensafe-{os.urandom(16).hex()}"
    try:
        descriptor = os.open(FOLDER / name, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, _MODE)
    except OSError as error:
        raise UnavailableError(f"no shared memory in {FOLDER} ({error.strerror})") from None
    region = SharedRegion(descriptor, size)
    try:
        # Whose lock is held is in use: a process that dies loses its locks.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, _MODE)
        os.posix_fallocate(descriptor, 0, size)
        challenge = os.urandom(CHALLENGE_BYTES)
        region.write(0, challenge)
    except OSError as error:
        _remove(name)
        raise UnavailableError(f"no {size} bytes of shared memory in {FOLDER} ({error.strerror})") from None
    except BaseException:
        _remove(name)
        raise
    return OfferedRegion(name, region, challenge)


def open_offered_region(name: str, size: int, limit: int) -> tuple[SharedRegion, bytes]:
    """The region that a host of the same user on this machine offers, and its challenge.

    It must be a regular file of our own user, mode 0600, with one name and exactly `size` bytes, at most `limit`.
    Raises InvalidInputError, which says what is wrong; the host then does without.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidInputError("not the name of a shared memory region")
    if not PAGE <= size <= min(limit, MAX_BYTES) or size % PAGE:
        raise InvalidInputError(f"shared memory of this size is not accepted: at most {limit} bytes, whole pages")
    try:
        descriptor = os.open(FOLDER / name, _OPEN_FLAGS)
    except OSError as error:
        raise InvalidInputError(f"the shared memory is not on this machine, or not ours ({error.strerror})") from None
    region = SharedRegion(descriptor, size)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) != _MODE:
        raise InvalidInputError("the shared memory is not a regular file of mode 0600")
    if status.st_uid != os.geteuid() or status.st_nlink != 1 or status.st_size != size:
        raise InvalidInputError("the shared memory has another owner, name or size than was said")
    return region, bytes(region.read(0, CHALLENGE_BYTES))


def sweep_abandoned_regions() -> None:
    """Remove regions of this user whose process died while it offered them."""
    try:
        names = [path.name for path in FOLDER.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return  # no such folder: there is no shared memory either
    for name in names:
        try:
            descriptor = os.open(FOLDER / name, _OPEN_FLAGS)
        except OSError:
            continue  # another user's, or gone meanwhile
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.geteuid():
                _remove(name)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(descriptor)


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):  # somebody was faster
        (FOLDER / name).unlink()
