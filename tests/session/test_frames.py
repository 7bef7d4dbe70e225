from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorguard.ckks.packing import pack
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, PARAMETER_SETS, ParameterSet, get_parameter_set
from tensorguard.ckks.plan import MAX_ROWS, Plan
from tensorguard.errors import InvalidInputError
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames
from tests.session import make_vectors

PARAMETERS = get_parameter_set(DEFAULT_PARAMETER_SET)
SHAPE = (len(PARAMETERS.primes), PARAMETERS.degree)


def make_request(count: int = 2, parameters: ParameterSet = PARAMETERS, **changes: Any) -> frames.EvaluationRequest:
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
        "b": generator.integers(0, 2**30, (count, len(parameters.primes), parameters.degree), dtype=np.uint32),
    }
    return frames.EvaluationRequest(**values | changes)


def make_response(
    responses: int = 2, tokens: int = 5, rows: int = 48, parameters: ParameterSet = PARAMETERS, **changes: Any
) -> frames.EvaluationResponse:
    generator = np.random.default_rng(responses)
    values: dict[str, Any] = {
        "request_id": 2**63,
        "c1": generator.integers(0, 2**30, (responses, parameters.degree), dtype=np.uint32),
        "c0": generator.integers(0, 2**30, (tokens, rows), dtype=np.uint32),
        "evaluate_ns": 123456789,
        "counts": frames.OperationCounts(1, 2, 3, 4, 5),
    }
    return frames.EvaluationResponse(**values | changes)


def same(left: Any, right: Any) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name))
        if isinstance(getattr(left, field.name), np.ndarray)
        else getattr(left, field.name) == getattr(right, field.name)
        for field in dataclasses.fields(left)
    )


class Memory:
    """A slot and the region around it, in this process."""

    def __init__(self, offset: int = 4096, length: int = 1 << 20) -> None:
        self.offset, self.length = offset, length
        self.content = bytearray(length)

    def slot(self, offset: int, length: int) -> Memory:
        if (offset, length) != (self.offset, self.length):
            raise InvalidInputError("outside")
        return self

    def read(self, length: int) -> Any:
        return np.frombuffer(bytes(self.content[:length]), np.uint8)

    def write(self, *arrays: Any) -> None:
        joined = b"".join(bytes(memoryview(array).cast("B")) for array in arrays)
        self.content[: len(joined)] = joined


# Frames say what they were made of


@pytest.mark.parametrize("name", sorted(PARAMETER_SETS))
@pytest.mark.parametrize("count", [1, 2, 9])
def test_request_survives(name: str, count: int) -> None:
    parameters = get_parameter_set(name)
    request = make_request(count, parameters)
    message = frames.write_request(request)
    assert same(frames.read_request(message, parameters), request)
    assert len(message) < frames.request_bytes(count, parameters) + 50


@pytest.mark.parametrize("name", sorted(PARAMETER_SETS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 48), (7, 100, 3), (1, 1, MAX_ROWS)])
def test_response_survives(name: str, shape: tuple[int, int, int]) -> None:
    parameters = get_parameter_set(name)
    response = make_response(*shape, parameters)
    message = frames.write_response(response)
    assert same(frames.read_response(message, parameters), response)
    assert len(message) < frames.response_bytes(*shape, parameters) + 80


@pytest.mark.parametrize("code", [frames.DELTA_UNAVAILABLE, frames.LEASE_EXPIRED, frames.BUDGET_EXHAUSTED])
def test_failure_survives(code: int) -> None:
    assert frames.read_response(frames.write_failure(12, code), PARAMETERS) == frames.EvaluationFailure(12, code)


@pytest.mark.parametrize("code", [0, 4, 255])
def test_other_failure_codes_are_refused(code: int) -> None:
    with pytest.raises(InvalidInputError, match="unknown failure code"):
        frames.read_response(frames.write_failure(12, code), PARAMETERS)


def test_arrays_by_reference_are_the_same_arrays() -> None:
    memory = Memory()
    request = make_request(3, slot=memory)
    message = frames.write_request(request)
    assert len(message) < 60 and frames.carried_bytes(message, PARAMETERS) > 3 * 46_080
    assert same(frames.read_request(message, PARAMETERS, memory), request)
    response = make_response(3)
    message = frames.write_response(response, memory)
    assert len(message) < 100 and frames.carried_bytes(message, PARAMETERS) > 3 * 15_360
    assert same(frames.read_response(message, PARAMETERS, memory), response)


def test_arrays_too_large_for_their_slot_go_inline() -> None:
    small = Memory(length=8192)
    message = frames.write_request(make_request(1, slot=small))
    assert len(message) > 46_080 and same(frames.read_request(message, PARAMETERS), make_request(1))
    message = frames.write_response(make_response(1), small)
    assert len(message) > 15_360 and same(frames.read_response(message, PARAMETERS), make_response(1))
    assert not any(small.content)


def test_messages_are_the_protobuf_messages_of_the_contract() -> None:
    # Byte for byte what protobuf writes, so that reflection and other clients stay true.
    for message, kind in (
        (frames.write_request(make_request()), pb.EvaluateRequest),
        (frames.write_request(make_request(slot=Memory())), pb.EvaluateRequest),
        (frames.write_response(make_response()), pb.EvaluateResponse),
        (frames.write_response(make_response(), Memory()), pb.EvaluateResponse),
        (frames.write_failure(1), pb.EvaluateResponse),
    ):
        parsed = kind.FromString(message)
        assert parsed.SerializeToString() == message and len(parsed.frame) > 0


# Test vectors, made without the engine


def vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(make_vectors.FILE.read_text())
    return loaded


def by_rule(*shape: int, first: int = 0) -> Any:
    """Residues of the vectors' rule; the last two axes are primes and N of `b`."""
    n = np.arange(shape[-1])
    rows = [
        (31 * n * n + 1_000_003 * n * (k + 1) + 7 * k) % make_vectors.PRIMES[(k % 3) if len(shape) == 3 else 0]
        for k in range(first, first + int(np.prod(shape[:-1])))
    ]
    return np.array(rows, np.uint32).reshape(shape)


def test_committed_vectors_are_those_of_the_script() -> None:
    assert vectors() == make_vectors.vectors()


def test_vectors() -> None:
    known = vectors()
    packing = known["packing"]
    assert pack(np.array(packing["residues"], np.uint32)).tobytes().hex() == packing["packed"]
    fields = known["request"]["fields"]
    request = make_request(
        2,
        ids=np.array(fields.pop("ids"), np.uint64),
        seeds=bytes.fromhex(fields.pop("seeds")),
        plan=Plan(*fields.pop("plan")),
        b=by_rule(2, 3, 4096),
        **fields | {"group": {3: "gate_up"}[fields["group"]]},
    )
    fields = known["response"]["fields"]
    response = frames.EvaluationResponse(
        request_id=fields["request_id"],
        c1=by_rule(3, 4096),
        c0=by_rule(1, 40, first=9).reshape(2, 20),
        evaluate_ns=fields["evaluate_ns"],
        counts=frames.OperationCounts(*fields["counts"]),
    )
    for name, message in (("request", frames.write_request(request)), ("response", frames.write_response(response))):
        assert message[:96].hex() == known[name]["begins"] and len(message) == known[name]["bytes"]
        assert hashlib.sha256(message).hexdigest() == known[name]["sha256"]
    reference = known["request_by_reference"]
    slot = Memory(reference["offset"], reference["length"])
    sent = make_request(
        2,
        slot=slot,
        group="qkv",
        layer=0,
        plan=Plan(1, 288, 12),
        adapter_handle=0,
        key_number=0,
        tokens=1,
        request_id=8,
    )
    assert frames.write_request(sent).hex() == reference["message"]
    for failure in known["failures"]:
        assert frames.write_failure(failure["request_id"], failure["code"]).hex() == failure["message"]


# What is not a frame is refused


SMALL_REQUEST = frames.write_request(make_request(1))
SMALL_RESPONSE = frames.write_response(make_response(1))
REFERENCE = Memory()
REQUEST_REFERENCE = frames.write_request(make_request(1, slot=REFERENCE))
FAILURE = frames.write_failure(7)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_with_a_typed_error(data: bytes) -> None:
    for read in (frames.read_request, frames.read_response):
        with pytest.raises(InvalidInputError):
            read(data, PARAMETERS)
    frames.request_id_of(data)


def header_of(message: bytes, size: int) -> range:
    """Positions of a message's prefix and header."""
    return range(len(message) - len(frames._frame(message)) + size)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_headers_are_refused_or_are_other_frames_of_the_same_size(data: st.DataObject) -> None:
    """No field is ignored: what is accepted is, written again, the damaged message."""
    good, size, read, write = data.draw(
        st.sampled_from(
            [
                (SMALL_REQUEST, 36, frames.read_request, frames.write_request),
                (SMALL_RESPONSE, 64, frames.read_response, frames.write_response),
                (FAILURE, 16, frames.read_response, lambda found: frames.write_failure(found.request_id, found.code)),
            ]
        )
    )
    message = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.sampled_from(header_of(good, size)))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(message), PARAMETERS)  # type: ignore[operator]
    except InvalidInputError:
        return
    assert write(found) == bytes(message)  # type: ignore[operator]


@pytest.mark.parametrize("message", [SMALL_REQUEST, SMALL_RESPONSE, REQUEST_REFERENCE, FAILURE])
def test_every_truncation_and_extension_is_refused(message: bytes) -> None:
    def refused(data: bytes) -> None:
        for read in (frames.read_request, frames.read_response):
            with pytest.raises(InvalidInputError):
                read(data, PARAMETERS, REFERENCE)

    frame = bytes(frames._frame(message))
    cuts = {*range(min(len(frame), 120)), *range(0, len(frame), 1009), len(frame) - 4, len(frame) - 1}
    for cut in cuts:
        refused(message[:cut])
        refused(pb.EvaluateRequest(frame=frame[:cut]).SerializeToString())
    for extra in (b"\0", bytes(8), bytes(15360), frame):
        refused(message + extra)
        refused(pb.EvaluateRequest(frame=frame + extra).SerializeToString())


@pytest.mark.parametrize("change", [-1, 1])
def test_length_that_lies_is_refused(change: int) -> None:
    """The frame inside is intact, but no protobuf reader would find it."""
    message = bytearray(SMALL_REQUEST)
    message[1] += change
    with pytest.raises(InvalidInputError, match="length"):
        frames.read_request(bytes(message), PARAMETERS)
    with pytest.raises(InvalidInputError, match="length"):
        frames.read_request(b"\x0a" + b"\xff" * 5 + SMALL_REQUEST, PARAMETERS)


def test_length_in_a_longer_form_is_refused() -> None:
    assert SMALL_REQUEST[:1] == FAILURE[:1] == b"\x0a" and FAILURE[1] == 16
    with pytest.raises(InvalidInputError, match="length"):
        frames.read_response(b"\x0a\x90\x00" + FAILURE[2:], PARAMETERS)


def with_header(position: int, value: bytes, message: bytes = SMALL_REQUEST) -> bytes:
    changed = bytearray(message)
    start = len(message) - len(frames._frame(message)) + position
    changed[start : start + len(value)] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("position", "value"),
    [
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


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (1, b"\x01"),
        (3, b"\x01"),  # reserved
        (4, b"\xff\xff\xff\xff"),  # responses
        (8, b"\x00\x00\x00\x00"),  # tokens
        (12, b"\x00\x00\x00\x00"),  # rows
        (12, (MAX_ROWS + 1).to_bytes(4, "little")),
    ],
)
def test_impossible_responses_are_refused(position: int, value: bytes) -> None:
    with pytest.raises(InvalidInputError):
        frames.read_response(with_header(position, value, SMALL_RESPONSE), PARAMETERS)


def test_limits_hold_for_frames_that_are_whole() -> None:
    for response in (make_response(1, 1, MAX_ROWS + 1), make_response(1, frames.MAX_TOKENS + 1, 1)):
        with pytest.raises(InvalidInputError, match="impossible shape"):
            frames.read_response(frames.write_response(response), PARAMETERS)
    with pytest.raises(InvalidInputError, match="1 to 65536 tokens"):
        frames.read_request(frames.write_request(make_request(1, tokens=frames.MAX_TOKENS + 1)), PARAMETERS)


@pytest.mark.parametrize("version", [0, 1, 2, 4, 255])
def test_other_versions_are_refused_by_name(version: int) -> None:
    told = f"frame version {version} is not spoken here: use version 3"
    with pytest.raises(InvalidInputError, match=told):
        frames.read_request(with_header(0, bytes([version])), PARAMETERS)
    for message in (SMALL_RESPONSE, FAILURE):
        with pytest.raises(InvalidInputError, match=told):
            frames.read_response(with_header(0, bytes([version]), message), PARAMETERS)
    assert frames.request_id_of(with_header(0, bytes([version]))) is None


def test_padding_is_zero() -> None:
    position = frames._RESPONSE_HEADER.size
    assert frames._frame(SMALL_RESPONSE)[2] > 0, "there is padding to test"
    with pytest.raises(InvalidInputError, match="padding"):
        frames.read_response(with_header(position, b"\x01", SMALL_RESPONSE), PARAMETERS)


@pytest.mark.parametrize("padding", range(8))
def test_another_alignment_is_the_same_frame(padding: int) -> None:
    """Padding is for speed: other writers may leave it out."""
    frame = bytearray(pb.EvaluateResponse.FromString(SMALL_RESPONSE).frame)
    frame[64 : 64 + frame[2]] = bytes(padding)
    frame[2] = padding
    message = pb.EvaluateResponse(frame=bytes(frame)).SerializeToString()
    assert same(frames.read_response(message, PARAMETERS), make_response(1))


@pytest.mark.parametrize("name", ["rotations", "key_switches", "evaluation_key_bytes"])
def test_a_peer_that_rotates_is_refused(name: str) -> None:
    counts = frames.OperationCounts(1, 2, 3, 4, 5)._replace(**{name: 1})
    with pytest.raises(InvalidInputError, match="this protocol has none"):
        frames.read_response(frames.write_response(make_response(counts=counts)), PARAMETERS)


def test_a_plan_larger_than_the_ring_is_refused() -> None:
    message = frames.write_request(make_request(plan=Plan(1, 64, 65)))
    with pytest.raises(InvalidInputError, match="exceeds the ring degree 4096"):
        frames.read_request(message, PARAMETERS)


def test_request_id_can_be_read_from_a_frame_that_is_wrong_elsewhere() -> None:
    assert frames.request_id_of(with_header(3, b"\x00")) == 7
    assert frames.request_id_of(with_header(3, b"\x00", REQUEST_REFERENCE)) == 7
    assert frames.request_id_of(b"\x0a\x00") is None


def test_own_oversize_frame_is_refused() -> None:
    huge = np.zeros((400, *SHAPE), np.uint32)
    request = make_request(1, ids=np.arange(400, dtype=np.uint64), seeds=bytes(32 * 400), b=huge)
    with pytest.raises(InvalidInputError, match="over the limit"):
        frames.write_request(request)


def test_request_needs_matching_arrays() -> None:
    with pytest.raises(InvalidInputError):
        frames.write_request(make_request(2, seeds=bytes(32)))


# References


def test_references_need_shared_memory() -> None:
    with pytest.raises(InvalidInputError, match="which this session has not"):
        frames.read_request(REQUEST_REFERENCE, PARAMETERS)
    message = frames.write_response(make_response(1), Memory())
    with pytest.raises(InvalidInputError, match="another slot"):
        frames.read_response(message, PARAMETERS)


@pytest.mark.parametrize(("offset", "length"), [(0, 1 << 20), (4096, 4096), (4096, 2 << 20), (2**64 - 1, 1 << 20)])
def test_a_response_in_another_slot_is_refused(offset: int, length: int) -> None:
    message = frames.write_response(make_response(1), Memory())
    with pytest.raises(InvalidInputError, match="another slot"):
        frames.read_response(message, PARAMETERS, Memory(offset, length))


def test_more_than_the_slot_has_is_refused() -> None:
    memory = Memory(length=8192)
    header = with_header(24, (1).to_bytes(4, "little"), REQUEST_REFERENCE)
    message = with_header(36, (4096).to_bytes(8, "little") + (8192).to_bytes(8, "little"), header)
    with pytest.raises(InvalidInputError, match="does not fit its slot"):
        frames.read_request(message, PARAMETERS, memory)


# Memory


def allocated_by(message: bytes, read: Any, *rest: Any) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError):
            read(message, PARAMETERS, *rest)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_header_makes_a_reader_allocate_what_did_not_arrive() -> None:
    most = (frames.MAX_CIPHERTEXTS).to_bytes(4, "little")
    assert allocated_by(with_header(24, most), frames.read_request) < 100_000
    assert allocated_by(with_header(4, most, SMALL_RESPONSE), frames.read_response) < 100_000
    assert allocated_by(with_header(24, most, REQUEST_REFERENCE), frames.read_request, REFERENCE) < 100_000


def test_what_is_read_is_a_private_copy() -> None:
    memory = Memory()
    request = make_request(1, slot=memory)
    read = frames.read_request(frames.write_request(request), PARAMETERS, memory)
    memory.content[:] = b"\xff" * memory.length
    assert same(read, request) and read.b.flags.owndata and read.ids.flags.owndata
