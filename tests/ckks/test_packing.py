from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tensorguard.ckks.packing import pack, packed_bytes, unpack, unpack_bytes
from tensorguard.errors import InvalidInputError

DEGREES = (16, 32, 4096, 8192)
LARGEST = 2**30 - 1


def packed_by_definition(polynomial: npt.NDArray[np.uint32]) -> list[int]:
    """One polynomial, straight from docs/protocol-session.md."""
    v = [int(value) for value in polynomial]
    m = len(v) // 16
    return [v[k * m + j] | ((v[15 * m + j] >> 2 * k) & 3) << 30 for k in range(15) for j in range(m)]


@pytest.mark.parametrize("degree", DEGREES)
def test_words_are_those_of_the_definition(degree: int) -> None:
    polynomials = np.random.default_rng(degree).integers(0, 2**30, (3, degree), dtype=np.uint32)
    assert pack(polynomials).tolist() == [packed_by_definition(row) for row in polynomials]


@given(
    arrays.arrays(
        np.uint32, st.tuples(st.integers(1, 4), st.sampled_from([16, 48, 256])), elements=st.integers(0, LARGEST)
    )
)
@settings(max_examples=50, deadline=None)
def test_round_trip(residues: npt.NDArray[np.uint32]) -> None:
    words = pack(residues)
    assert words.nbytes == packed_bytes(*residues.shape) == residues.nbytes * 15 // 16
    assert np.array_equal(unpack_bytes(words.tobytes(), residues.shape), residues)


@pytest.mark.parametrize("shape", [(2, 3, 4096), (1, 5, 8192), (4096,)])
def test_shapes_are_the_callers(shape: tuple[int, ...]) -> None:
    residues = np.random.default_rng(1).integers(0, 2**30, shape, dtype=np.uint32)
    found = unpack(pack(residues).view(np.uint8).reshape(-1), shape)
    assert found.shape == shape and found.dtype == np.uint32 and np.array_equal(found, residues)


@given(st.binary(min_size=60, max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_words_unpack_to_30_bits_and_pack_to_the_same_words(data: bytes) -> None:
    residues = unpack_bytes(data, (1, 16))
    assert residues.max() <= LARGEST and pack(residues).tobytes() == data


@pytest.mark.parametrize("position", [0, 1, 3839, 3840, 4095])
@pytest.mark.parametrize("value", [2**30, 2**31, 2**32 - 1])
def test_more_than_30_bits_are_refused(position: int, value: int) -> None:
    residues = np.zeros((2, 4096), np.uint32)
    residues[1, position] = value
    with pytest.raises(InvalidInputError, match="30 bits"):
        pack(residues)


def test_alignment_and_strides_do_not_matter() -> None:
    residues = np.random.default_rng(2).integers(0, 2**30, (4, 64), dtype=np.uint32)
    shifted = np.frombuffer(b"\0" + pack(residues).tobytes(), np.uint8)[1:]
    assert np.array_equal(unpack(shifted, residues.shape), residues)
    assert np.array_equal(pack(residues[::2]), pack(residues)[::2])


def test_what_is_unpacked_is_a_private_copy() -> None:
    residues = np.random.default_rng(3).integers(0, 2**30, (1, 64), dtype=np.uint32)
    source = np.frombuffer(pack(residues).tobytes(), np.uint8).copy()
    found = unpack(source, residues.shape)
    source[:] = 255
    assert np.array_equal(found, residues)
