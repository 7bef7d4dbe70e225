"""Binary frames of the hot path, inside the protobuf message `{bytes frame = 1}`.

A frame is a fixed little-endian header, up to seven zero bytes that put the arrays on an eight-byte boundary
of the message, and the arrays as they lie in memory. Writing copies each array once; reading copies nothing
(the arrays are read-only views of the received message). Lengths are checked before an array is looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import MAX_ROWS, Plan
from tensorguard.errors import InvalidInputError

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024 - 16
MAX_TOKENS = 1 << 16
MAX_CIPHERTEXTS = 1 << 12
SEED_BYTES = 32

GROUP_CODES = {"qkv": 1, "o": 2, "gate_up": 3, "down": 4}
_GROUP_NAMES = {code: name for name, code in GROUP_CODES.items()}

_REQUEST, _RESPONSE, _ERROR = 1, 2, 3
DELTA_UNAVAILABLE = 1
"""The only error code: the host learns that there is no answer, not why."""

# version, kind, padding, group | layer, plan (tokens, channels, rows)
# | handle, key number, tokens, ciphertexts | request id
_REQUEST_HEADER = struct.Struct("<BBBBHHHHIIIIQ")
# version, kind, padding, 0 | responses, tokens, rows | request id, evaluation ns | five operation counts
_RESPONSE_HEADER = struct.Struct("<BBBBIIIQQIIIII")
# version, kind, 0, code | 0 | request id
_ERROR_HEADER = struct.Struct("<BBBBIQ")
_FIELD_1_BYTES = 0x0A  # protobuf: field 1, wire type 2

Buffer = Any  # bytes, memoryview or a C-contiguous array


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """T tokens for one group of one layer, encrypted: ids uint64 [C], seeds bytes [C*32], b uint32 [C, L, N]."""

    request_id: int
    adapter_handle: int
    layer: int
    group: str
    plan: Plan
    tokens: int
    key_number: int
    ids: npt.NDArray[np.uint64]
    seeds: bytes
    b: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class OperationCounts:
    """What one evaluation did. There is no field for rotations or key switches: none exists."""

    ntt: int = 0
    products: int = 0
    additions: int = 0
    rerandomisations: int = 0
    modulus_switches: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationResponse:
    """c1 uint32 [D, N] and the wanted coefficients c0 uint32 [T, rows], modulo the first prime."""

    request_id: int
    c1: npt.NDArray[np.uint32]
    c0: npt.NDArray[np.uint32]
    evaluate_ns: int
    counts: OperationCounts


@dataclass(frozen=True, slots=True)
class EvaluationFailure:
    """No answer to this request. The cause is in the coprocessor's log only."""

    request_id: int
    code: int = DELTA_UNAVAILABLE


def write_request(request: EvaluationRequest) -> bytes:
    """The protobuf bytes of `EvaluateRequest`."""
    ids = np.ascontiguousarray(request.ids, dtype="<u8")
    b = np.ascontiguousarray(request.b, dtype="<u4")
    plan = request.plan
    arrays = (ids, request.seeds, b)
    if len(request.seeds) != len(ids) * SEED_BYTES or len(b) != len(ids):
        raise InvalidInputError("a request needs one id, seed and residue array per ciphertext")
    return _message(
        _REQUEST_HEADER,
        lambda padding: (
            *(VERSION, _REQUEST, padding, GROUP_CODES[request.group]),
            *(request.layer, plan.tokens, plan.channels, plan.rows),
            *(request.adapter_handle, request.key_number, request.tokens, len(ids)),
            request.request_id,
        ),
        arrays,
    )


def write_response(response: EvaluationResponse) -> bytes:
    """The protobuf bytes of `EvaluateResponse`."""
    c1 = np.ascontiguousarray(response.c1, dtype="<u4")
    c0 = np.ascontiguousarray(response.c0, dtype="<u4")
    counts = response.counts
    return _message(
        _RESPONSE_HEADER,
        lambda padding: (
            *(VERSION, _RESPONSE, padding, 0, len(c1), c0.shape[0], c0.shape[1]),
            *(response.request_id, response.evaluate_ns),
            *(
                counts.ntt,
                counts.products,
                counts.additions,
                counts.rerandomisations,
                counts.modulus_switches,
            ),
        ),
        (c1, c0),
    )


def write_failure(request_id: int) -> bytes:
    """The protobuf bytes of an `EvaluateResponse` that says only that there is no delta."""
    header = (VERSION, _ERROR, 0, DELTA_UNAVAILABLE, 0, request_id)
    return _message(_ERROR_HEADER, lambda _: header, ())


def read_request(message: bytes, parameters: ParameterSet) -> EvaluationRequest:
    """Parse the protobuf bytes of `EvaluateRequest`. Raises InvalidInputError. Residues are not yet checked."""
    frame = _frame(message)
    version, kind, padding, group, layer, *rest = _header(frame, _REQUEST_HEADER)
    plan_tokens, plan_channels, plan_rows, handle, key_number, tokens, count, request_id = rest
    if version != VERSION or kind != _REQUEST or padding > 7:
        raise InvalidInputError("not an evaluation request of protocol version 1")
    if group not in _GROUP_NAMES:
        raise InvalidInputError("unknown group of projections")
    if not 1 <= tokens <= MAX_TOKENS or not 1 <= count <= MAX_CIPHERTEXTS:
        raise InvalidInputError(f"a request has 1 to {MAX_TOKENS} tokens and 1 to {MAX_CIPHERTEXTS} ciphertexts")
    plan = Plan(plan_tokens, plan_channels, plan_rows)
    plan.check(parameters)
    shape = (count, len(parameters.primes), parameters.degree)
    body = _body(frame, _REQUEST_HEADER.size + padding, 8 * count, SEED_BYTES * count, 4 * int(np.prod(shape)))
    return EvaluationRequest(
        request_id=request_id,
        adapter_handle=handle,
        layer=layer,
        group=_GROUP_NAMES[group],
        plan=plan,
        tokens=tokens,
        key_number=key_number,
        ids=np.frombuffer(body[0], "<u8"),
        seeds=bytes(body[1]),
        b=np.frombuffer(body[2], "<u4").reshape(shape),
    )


def read_response(message: bytes, parameters: ParameterSet) -> EvaluationResponse | EvaluationFailure:
    """Parse the protobuf bytes of `EvaluateResponse`. Raises InvalidInputError. Residues are not yet checked."""
    frame = _frame(message)
    if len(frame) == _ERROR_HEADER.size:
        version, kind, _, code, _, request_id = _header(frame, _ERROR_HEADER)
        if version != VERSION or kind != _ERROR or code != DELTA_UNAVAILABLE:
            raise InvalidInputError("not an evaluation response of protocol version 1")
        return EvaluationFailure(request_id)
    version, kind, padding, _, count, tokens, rows, request_id, nanoseconds, *counts = _header(frame, _RESPONSE_HEADER)
    if version != VERSION or kind != _RESPONSE or padding > 7:
        raise InvalidInputError("not an evaluation response of protocol version 1")
    if not (1 <= count <= MAX_CIPHERTEXTS and 1 <= tokens <= MAX_TOKENS and 1 <= rows <= MAX_ROWS):
        raise InvalidInputError("an evaluation response with an impossible shape")
    degree = parameters.degree
    body = _body(frame, _RESPONSE_HEADER.size + padding, 4 * count * degree, 4 * tokens * rows)
    return EvaluationResponse(
        request_id=request_id,
        c1=np.frombuffer(body[0], "<u4").reshape(count, degree),
        c0=np.frombuffer(body[1], "<u4").reshape(tokens, rows),
        evaluate_ns=nanoseconds,
        counts=OperationCounts(*counts),
    )


def request_id_of(message: bytes) -> int | None:
    """The request id of a request that is wrong elsewhere, if it can be read: the error frame names it."""
    try:
        frame = _frame(message)
        fields = _header(frame, _REQUEST_HEADER)
    except InvalidInputError:
        return None
    return int(fields[-1]) if fields[:2] == (VERSION, _REQUEST) else None


def identity(message: bytes) -> bytes:
    """Serialiser and parser of a method whose messages are already protobuf bytes."""
    return message


def _message(header: struct.Struct, fields: Any, arrays: tuple[Buffer, ...]) -> bytes:
    body = sum(memoryview(array).nbytes for array in arrays)
    # The length prefix depends on the padding by at most a few bytes: settle both.
    padding, prefix = 0, b""
    for _ in range(3):
        prefix = bytes([_FIELD_1_BYTES]) + _varint(header.size + padding + body)
        padding = -(len(prefix) + header.size) % 8 if arrays else 0
    length = header.size + padding + body
    prefix = bytes([_FIELD_1_BYTES]) + _varint(length)
    if length > MAX_FRAME_BYTES:
        raise InvalidInputError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return b"".join((prefix, header.pack(*fields(padding)), bytes(padding), *arrays))


def _frame(message: bytes) -> memoryview:
    """The bytes of field 1. Exactly one field, in the shortest form: what our own writers produce."""
    if not message or message[0] != _FIELD_1_BYTES:
        raise InvalidInputError("not a frame")
    length = shift = 0
    for position in range(1, min(len(message), 6)):
        byte = message[position]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    else:
        raise InvalidInputError("not a frame: unreadable length")
    if length != len(message) - position - 1 or length > MAX_FRAME_BYTES:
        raise InvalidInputError("not a frame: the length does not fit the message")
    return memoryview(message)[position + 1 :]


def _header(frame: memoryview, header: struct.Struct) -> tuple[int, ...]:
    if len(frame) < header.size:
        raise InvalidInputError("the frame is shorter than its header")
    return header.unpack_from(frame)


def _body(frame: memoryview, offset: int, *sizes: int) -> list[memoryview]:
    if len(frame) != offset + sum(sizes):
        raise InvalidInputError("the frame's length does not fit its header")
    parts = []
    for size in sizes:
        parts.append(frame[offset : offset + size])
        offset += size
    return parts


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
