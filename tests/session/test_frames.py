from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, get_parameter_set
from tensorguard.ckks.plan import Plan
from tensorguard.errors import InvalidInputError
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames

PARAMETERS = get_parameter_set(DEFAULT_PARAMETER_SET)
SHAPE = (len(PARAMETERS.primes), PARAMETERS.degree)


def make_request(count: int = 2, **changes: Any) -> frames.EvaluationRequest:
    generator = np.random.default_rng(count)
    values: dict[str, Any] = {
        "request_id": 7,
        "adapter_handle": 3,
        "layer": 29,
        "group": "gate_up",
        "plan": Plan(8, 64, 8),
        "tokens": 5,
        "key_number": 2,
        "ids": np.arange(1, count + 1, dtype=np.uint64) << np.uint64(40),
        "seeds": generator.bytes(32 * count),
        "b": generator.integers(0, 2**30, (count, *SHAPE), dtype=np.uint32),
    }
    return frames.EvaluationRequest(**values | changes)


def make_response(responses: int = 2, tokens: int = 5, rows: int = 48) -> frames.EvaluationResponse:
    generator = np.random.default_rng(responses)
    return frames.EvaluationResponse(
        request_id=2**63,
        c1=generator.integers(0, 2**30, (responses, PARAMETERS.degree), dtype=np.uint32),
        c0=generator.integers(0, 2**30, (tokens, rows), dtype=np.uint32),
        evaluate_ns=123456789,
        counts=frames.OperationCounts(1, 2, 3, 4, 5),
    )


def same(left: Any, right: Any) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name))
        if isinstance(getattr(left, field.name), np.ndarray)
        else getattr(left, field.name) == getattr(right, field.name)
        for field in dataclasses.fields(left)
    )


@pytest.mark.parametrize("count", [1, 2, 9])
def test_request_survives(count: int) -> None:
    request = make_request(count)
    assert same(frames.read_request(frames.write_request(request), PARAMETERS), request)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 48), (7, 100, 3)])
def test_response_survives(shape: tuple[int, int, int]) -> None:
    response = make_response(*shape)
    assert same(frames.read_response(frames.write_response(response), PARAMETERS), response)


def test_failure_survives_and_has_one_code() -> None:
    assert frames.read_response(frames.write_failure(12), PARAMETERS) == frames.EvaluationFailure(12, 1)


def test_messages_are_the_protobuf_messages_of_the_contract() -> None:
    # Byte for byte what protobuf writes, so that reflection and other clients stay true.
    for message, kind in (
        (frames.write_request(make_request()), pb.EvaluateRequest),
        (frames.write_response(make_response()), pb.EvaluateResponse),
        (frames.write_failure(1), pb.EvaluateResponse),
    ):
        parsed = kind.FromString(message)
        assert parsed.SerializeToString() == message and len(parsed.frame) > 0


def test_known_bytes() -> None:
    assert frames.write_failure(0x0102).hex() == "0a10" + "01030001" + "00000000" + "0201000000000000"
    request = frames.write_request(make_request(1))
    # tag, length (3 bytes), then the header as docs/protocol-session.md lists it
    assert request[0] == 0x0A
    assert request[4:40].hex() == (
        "01010003" + "1d00" + "080040000800" + "03000000" + "02000000" + "05000000" + "01000000" + "0700000000000000"
    )


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_arrays_are_views_on_aligned_memory(count: int) -> None:
    message = frames.write_request(make_request(count))
    request = frames.read_request(message, PARAMETERS)
    assert request.b.flags.aligned and request.ids.flags.aligned and not request.b.flags.writeable
    start = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    assert start < request.b.__array_interface__["data"][0] < start + len(message)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_with_a_typed_error(data: bytes) -> None:
    for read in (frames.read_request, frames.read_response):
        with pytest.raises(InvalidInputError):
            read(data, PARAMETERS)
    frames.request_id_of(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_frames_are_refused_or_keep_their_shape(data: st.DataObject) -> None:
    """Changing a byte never makes a reader run out of its bounds: it is refused or a frame of the same size."""
    message = bytearray(SMALL_REQUEST)
    position = data.draw(st.integers(0, 60))
    message[position] = data.draw(st.integers(0, 255))
    try:
        request = frames.read_request(bytes(message), PARAMETERS)
    except InvalidInputError:
        return
    assert request.b.shape == (1, *SHAPE) and request.ids.shape == (1,) and len(request.seeds) == 32


SMALL_REQUEST = frames.write_request(make_request(1))


@pytest.mark.parametrize("cut", [0, 1, 3, 20, 39, 40, 1000, len(SMALL_REQUEST) - 1])
def test_truncated_frames_are_refused(cut: int) -> None:
    with pytest.raises(InvalidInputError):
        frames.read_request(SMALL_REQUEST[:cut], PARAMETERS)


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(InvalidInputError):
        frames.read_request(SMALL_REQUEST + b"\0", PARAMETERS)
    doubled = pb.EvaluateRequest.FromString(SMALL_REQUEST).frame * 2
    with pytest.raises(InvalidInputError):
        frames.read_request(pb.EvaluateRequest(frame=doubled).SerializeToString(), PARAMETERS)


@pytest.mark.parametrize("change", [-1, 1])
def test_length_that_lies_is_refused(change: int) -> None:
    """The frame inside is intact, but no protobuf reader would find it."""
    message = bytearray(SMALL_REQUEST)
    message[1] += change
    with pytest.raises(InvalidInputError, match="length"):
        frames.read_request(bytes(message), PARAMETERS)
    with pytest.raises(InvalidInputError, match="length"):
        frames.read_request(b"\x0a" + b"\xff" * 5 + SMALL_REQUEST, PARAMETERS)


def with_header(position: int, value: bytes) -> bytes:
    message = bytearray(SMALL_REQUEST)
    message[4 + position : 4 + position + len(value)] = value
    return bytes(message)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, b"\x02"),  # version
        (1, b"\x02"),  # kind
        (2, b"\x09"),  # padding
        (3, b"\x00"),  # group
        (3, b"\x05"),
        (6, b"\x00\x00"),  # plan with no tokens
        (8, b"\xff\xff"),  # plan over the ring degree
        (20, b"\x00\x00\x00\x00"),  # no tokens
        (20, b"\xff\xff\xff\xff"),
        (24, b"\x00\x00\x00\x00"),  # no ciphertexts
        (24, b"\x02\x00\x00\x00"),  # more than there are
        (24, b"\xff\xff\xff\xff"),  # would be 200 TB
    ],
)
def test_impossible_headers_are_refused(position: int, value: bytes) -> None:
    with pytest.raises(InvalidInputError):
        frames.read_request(with_header(position, value), PARAMETERS)


def test_request_id_can_be_read_from_a_frame_that_is_wrong_elsewhere() -> None:
    assert frames.request_id_of(with_header(3, b"\x00")) == 7
    assert frames.request_id_of(b"\x0a\x00") is None


def test_own_oversize_frame_is_refused() -> None:
    huge = np.zeros((400, *SHAPE), np.uint32)
    request = make_request(1, ids=np.arange(400, dtype=np.uint64), seeds=bytes(32 * 400), b=huge)
    with pytest.raises(InvalidInputError, match="over the limit"):
        frames.write_request(request)


def test_request_needs_matching_arrays() -> None:
    with pytest.raises(InvalidInputError):
        frames.write_request(make_request(2, seeds=bytes(32)))


def test_plans_larger_than_the_sessions_ring_are_refused() -> None:
    message = frames.write_request(make_request(plan=Plan(1, PARAMETERS.degree + 1, 1)))
    with pytest.raises(InvalidInputError, match=f"exceeds the ring degree {PARAMETERS.degree}"):
        frames.read_request(message, PARAMETERS)
