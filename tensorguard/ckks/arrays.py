"""Arrays that begin on a cache line, and scratch that is kept between calls.

Vector loads that cross two lines cost the transform up to a third; memory that goes back to the system after every
call costs a page fault for every 4 KiB of the next.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

_LINE = 64
"""Bytes."""
_MOST_KEPT = 1 << 21
"""Values of a scratch array that is kept; a larger one is made for its call."""


def aligned_empty(*shape: int) -> npt.NDArray[np.uint32]:
    """Uninitialised uint32 of this shape, on a cache line."""
    raw = np.empty(4 * math.prod(shape) + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + 4 * math.prod(shape)].view(np.uint32).reshape(shape)


def aligned(array: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """``array`` if it is contiguous and begins on a cache line, else a copy that does."""
    if array.flags.c_contiguous and array.ctypes.data % _LINE == 0:
        return array
    result = aligned_empty(*array.shape)
    result[...] = array
    return result


class Scratch(threading.local):
    """One array for each use and thread, reused: what a call leaves in it is overwritten by the next."""

    def __init__(self) -> None:
        self._kept: dict[str, npt.NDArray[np.uint32]] = {}
        self._last: dict[str, npt.NDArray[np.uint32]] = {}
        """What was given out last, in its shape: calls mostly repeat it."""

    def take(self, use: str, *shape: int) -> npt.NDArray[np.uint32]:
        """Uninitialised uint32 of this shape, valid until this thread takes it for the same use again."""
        last = self._last.get(use)
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        if size > _MOST_KEPT:
            return aligned_empty(*shape)
        kept = self._kept.get(use)
        if kept is None or kept.size < size:
            kept = self._kept[use] = aligned_empty(size)
        last = self._last[use] = kept[:size].reshape(shape)
        return last


scratch = Scratch()
