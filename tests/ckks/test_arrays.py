from __future__ import annotations

import threading

import numpy as np
import pytest

from tensorguard.ckks import arrays
from tensorguard.ckks.arrays import Scratch, aligned, aligned_empty


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 4096)])
def test_arrays_begin_on_a_cache_line(shape: tuple[int, ...]) -> None:
    for _ in range(5):
        array = aligned_empty(*shape)
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.uint32, True)
        assert array.ctypes.data % 64 == 0


def test_only_what_is_not_aligned_is_copied() -> None:
    array = aligned_empty(8, 16)
    array[:] = np.arange(128).reshape(8, 16)
    assert aligned(array) is array
    for other in (array.T, array.reshape(-1)[1:]):
        copied = aligned(other)
        assert copied.ctypes.data % 64 == 0
        np.testing.assert_array_equal(copied, other)


def test_scratch_is_reused_and_uses_do_not_share_it() -> None:
    scratch = Scratch()
    first = scratch.take("a", 4, 100)
    assert np.shares_memory(first, scratch.take("a", 10, 10))
    assert scratch.take("a", 4, 100).shape == (4, 100)
    assert not np.shares_memory(first, scratch.take("b", 4, 100))
    larger = scratch.take("a", 4, 1000)
    assert larger.shape == (4, 1000)
    assert np.shares_memory(larger, scratch.take("a", 4, 100))


def test_each_thread_has_scratch_of_its_own() -> None:
    scratch = Scratch()
    others: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: others.append(scratch.take("a", 50)))
    thread.start()
    thread.join()
    assert not np.shares_memory(scratch.take("a", 50), others[0])


def test_large_scratch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_MOST_KEPT", 100)
    scratch = Scratch()
    large = scratch.take("a", 101)
    assert not np.shares_memory(large, scratch.take("a", 101))
    assert not scratch._kept
