"""Binary frames of the hot path, inside the protobuf message `{bytes frame = 1}`. Version 3.

A frame is a fixed little-endian header and the arrays: either in the frame, after up to seven zero bytes that put them
on an eight-byte boundary of the message, or in a slot of shared memory, and the frame has a reference to it. Residues
are packed (`tensorguard.ckks.packing`). Lengths are checked before an array is looked at, and readers allocate no more
than the bytes that arrived allow; what they return is their own copy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.packing import pack, packed_bytes, unpack
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import MAX_ROWS, Plan
from tensorguard.ckks.randomness import SEED_BYTES
from tensorguard.errors import InvalidInputError
from tensorguard.session.shared_memory import Buffer, SharedRegion, Slot

VERSION = 3
MAX_FRAME_BYTES = 16 * 1024 * 1024 - 16
"""Of a frame with everything that belongs to it, wherever its arrays lie."""
MAX_TOKENS = 1 << 16
MAX_CIPHERTEXTS = 1 << 12

GROUP_CODES = {"qkv": 1, "o": 2, "gate_up": 3, "down": 4}
_GROUP_NAMES = {code: name for name, code in GROUP_CODES.items()}

_REQUEST, _RESPONSE, _FAILURE, _REQUEST_REFERENCE, _RESPONSE_REFERENCE = 1, 2, 3, 4, 5
DELTA_UNAVAILABLE, LEASE_EXPIRED, BUDGET_EXHAUSTED = 1, 2, 3
"""Failure codes. The last two are about the adapter alone, whatever the request: ListAdapters tells them anybody. For
every other cause the host learns that there is no answer, not why."""
_FAILURE_CODES = (DELTA_UNAVAILABLE, LEASE_EXPIRED, BUDGET_EXHAUSTED)

# version, kind, padding, group | layer, plan (tokens, channels, rows)
# | handle, key number, tokens, ciphertexts | request id
_REQUEST_HEADER = struct.Struct("<BBBBHHHHIIIIQ")
# version, kind, padding, 0 | responses, tokens, rows | request id, evaluation ns | eight operation counts
_RESPONSE_HEADER = struct.Struct("<BBBBIIIQQIIIIIIII")
# version, kind, 0, code | 0 | request id
_FAILURE_HEADER = struct.Struct("<BBBBIQ")
# offset, length of the slot
_REFERENCE = struct.Struct("<QQ")
_FIELD_1_BYTES = 0x0A  # protobuf: field 1, wire type 2


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
    slot: Slot | None = None
    """Where the arrays lay; the answer may be put there."""


class OperationCounts(NamedTuple):
    """What one evaluation did, in the order of the wire.

    The last three are 0 by construction: the evaluator has no such operation and no message could carry a key for
    one. They are on the wire because users ask, and a response in which one is not 0 is refused.

    A tuple, because both sides read it all in every call, and `dataclasses.asdict` makes deep copies.
    """

    ntt: int = 0
    products: int = 0
    additions: int = 0
    rerandomisations: int = 0
    modulus_switches: int = 0
    rotations: int = 0
    key_switches: int = 0
    evaluation_key_bytes: int = 0


OPERATIONS = OperationCounts._fields


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
    """No answer to this request, and one of three codes. The cause is in the coprocessor's log only."""

    request_id: int
    code: int = DELTA_UNAVAILABLE


def request_bytes(ciphertexts: int, parameters: ParameterSet) -> int:
    """Bytes of the arrays of a request."""
    return ciphertexts * (8 + SEED_BYTES) + packed_bytes(ciphertexts * len(parameters.primes), parameters.degree)


def response_bytes(responses: int, tokens: int, rows: int, parameters: ParameterSet) -> int:
    """Bytes of the arrays of a response."""
    return packed_bytes(responses, parameters.degree) + 4 * tokens * rows


def write_request(request: EvaluationRequest) -> bytes:
    """The protobuf bytes of `EvaluateRequest`. The arrays go into `request.slot` if it has one that is large enough.

    Raises InvalidInputError for arrays that do not fit together or a frame over the limit.
    """
    ids = np.ascontiguousarray(request.ids, dtype="<u8")
    plan = request.plan
    if len(request.seeds) != len(ids) * SEED_BYTES or len(request.b) != len(ids):
        raise InvalidInputError("a request needs one id, seed and residue array per ciphertext")
    return _message(
        _REQUEST_HEADER,
        lambda kind, padding: (
            *(VERSION, kind, padding, GROUP_CODES[request.group]),
            *(request.layer, plan.tokens, plan.channels, plan.rows),
            *(request.adapter_handle, request.key_number, request.tokens, len(ids)),
            request.request_id,
        ),
        (_REQUEST, _REQUEST_REFERENCE),
        (ids, request.seeds, pack(request.b)),
        request.slot,
    )


def write_response(response: EvaluationResponse, slot: Slot | None = None) -> bytes:
    """The protobuf bytes of `EvaluateResponse`. The arrays go into the request's slot if they fit there."""
    c0 = np.ascontiguousarray(response.c0, dtype="<u4")
    return _message(
        _RESPONSE_HEADER,
        lambda kind, padding: (
            *(VERSION, kind, padding, 0, len(response.c1), c0.shape[0], c0.shape[1]),
            *(response.request_id, response.evaluate_ns),
            *response.counts,
        ),
        (_RESPONSE, _RESPONSE_REFERENCE),
        (pack(response.c1), c0),
        slot,
    )


def write_failure(request_id: int, code: int = DELTA_UNAVAILABLE) -> bytes:
    """The protobuf bytes of an `EvaluateResponse` that says that there is no delta."""
    frame = _FAILURE_HEADER.pack(VERSION, _FAILURE, 0, code, 0, request_id)
    return _prefix(len(frame)) + frame


def read_request(message: bytes, parameters: ParameterSet, memory: SharedRegion | None = None) -> EvaluationRequest:
    """Parse the protobuf bytes of `EvaluateRequest`; references are to `memory`.

    Raises InvalidInputError. That residues are below their primes is not yet checked.
    """
    frame = _frame(message)
    version, kind, padding, group, layer, *rest = _header(frame, _REQUEST_HEADER)
    plan_tokens, plan_channels, plan_rows, handle, key_number, tokens, count, request_id = rest
    _check_kind(version, kind, padding, (_REQUEST, _REQUEST_REFERENCE))
    if group not in _GROUP_NAMES:
        raise InvalidInputError("unknown group of projections")
    if not 1 <= tokens <= MAX_TOKENS or not 1 <= count <= MAX_CIPHERTEXTS:
        raise InvalidInputError(f"a request has 1 to {MAX_TOKENS} tokens and 1 to {MAX_CIPHERTEXTS} ciphertexts")
    plan = Plan(plan_tokens, plan_channels, plan_rows)
    plan.check(parameters)
    size, slot = request_bytes(count, parameters), None
    if kind == _REQUEST_REFERENCE:
        if memory is None:
            raise InvalidInputError("a reference to shared memory, which this session has not")
        slot = memory.slot(*_reference(frame, _REQUEST_HEADER, padding))
        body = _from_slot(slot, size)
    else:
        body = _inline(frame, _REQUEST_HEADER, padding, size)
    seeds_at = 8 * count
    b_at = seeds_at + SEED_BYTES * count
    return EvaluationRequest(
        request_id=request_id,
        adapter_handle=handle,
        layer=layer,
        group=_GROUP_NAMES[group],
        plan=plan,
        tokens=tokens,
        key_number=key_number,
        ids=body[:seeds_at].view("<u8").copy(),
        seeds=body[seeds_at:b_at].tobytes(),
        b=unpack(body[b_at:], (count, len(parameters.primes), parameters.degree)),
        slot=slot,
    )


def read_response(
    message: bytes, parameters: ParameterSet, slot: Slot | None = None
) -> EvaluationResponse | EvaluationFailure:
    """Parse the protobuf bytes of `EvaluateResponse`; a reference must be to `slot`, which its request gave.

    Raises InvalidInputError, also for a response that admits a rotation, a key switch or an evaluation key. That
    residues are below the prime is not yet checked.
    """
    frame = _frame(message)
    if len(frame) == _FAILURE_HEADER.size:
        version, kind, padding, code, reserved, request_id = _header(frame, _FAILURE_HEADER)
        _check_kind(version, kind, padding, (_FAILURE,))
        if code not in _FAILURE_CODES or padding or reserved:
            raise InvalidInputError("an unknown failure code")
        return EvaluationFailure(request_id, code)
    version, kind, padding, reserved, count, tokens, rows, request_id, nanoseconds, *counts = _header(
        frame, _RESPONSE_HEADER
    )
    _check_kind(version, kind, padding, (_RESPONSE, _RESPONSE_REFERENCE))
    if reserved or not (1 <= count <= MAX_CIPHERTEXTS and 1 <= tokens <= MAX_TOKENS and 1 <= rows <= MAX_ROWS):
        raise InvalidInputError("an evaluation response with an impossible shape")
    operations = OperationCounts(*counts)
    if operations.rotations or operations.key_switches or operations.evaluation_key_bytes:
        raise InvalidInputError("the peer rotates, switches keys or holds evaluation keys: this protocol has none")
    size = response_bytes(count, tokens, rows, parameters)
    if kind == _RESPONSE_REFERENCE:
        if slot is None or _reference(frame, _RESPONSE_HEADER, padding) != (slot.offset, slot.length):
            raise InvalidInputError("a response in another slot of the shared memory than its request's")
        body = _from_slot(slot, size)
    else:
        body = _inline(frame, _RESPONSE_HEADER, padding, size)
    c0_at = packed_bytes(count, parameters.degree)
    return EvaluationResponse(
        request_id=request_id,
        c1=unpack(body[:c0_at], (count, parameters.degree)),
        c0=body[c0_at:].view("<u4").reshape(tokens, rows).copy(),
        evaluate_ns=nanoseconds,
        counts=operations,
    )


def request_id_of(message: bytes) -> int | None:
    """The request id of a request that is wrong elsewhere, if it can be read: the error frame names it."""
    try:
        header = _header(_frame(message), _REQUEST_HEADER)
    except InvalidInputError:
        return None
    return int(header[-1]) if header[:2] in ((VERSION, _REQUEST), (VERSION, _REQUEST_REFERENCE)) else None


def answered_request(message: bytes) -> int:
    """The request id of a response or failure, whose slot is to be given to `read_response`.

    Raises InvalidInputError.
    """
    frame = _frame(message)
    if len(frame) == _FAILURE_HEADER.size:
        return int(_header(frame, _FAILURE_HEADER)[-1])
    return int(_header(frame, _RESPONSE_HEADER)[7])


def carried_bytes(message: bytes, parameters: ParameterSet) -> int:
    """Bytes of a well-formed message with its arrays, wherever they lie."""
    frame = _frame(message)
    if frame[1] == _REQUEST_REFERENCE:
        return len(message) + request_bytes(_header(frame, _REQUEST_HEADER)[11], parameters)
    if frame[1] == _RESPONSE_REFERENCE:
        responses, tokens, rows = _header(frame, _RESPONSE_HEADER)[4:7]
        return len(message) + response_bytes(responses, tokens, rows, parameters)
    return len(message)


def identity(message: bytes) -> bytes:
    """Serialiser and parser of a method whose messages are already protobuf bytes."""
    return message


def _message(
    header: struct.Struct,
    values: Callable[[int, int], tuple[int, ...]],
    kinds: tuple[int, int],
    arrays: tuple[Buffer, ...],
    slot: Slot | None,
) -> bytes:
    """A frame with its arrays inside (the first kind) or in the slot (the second). `values` of kind and padding."""
    body = sum(memoryview(array).nbytes for array in arrays)
    if header.size + body > MAX_FRAME_BYTES - 8:
        raise InvalidInputError(f"a frame of {header.size + body} bytes is over the limit of {MAX_FRAME_BYTES}")
    if slot is not None and body <= slot.length:
        slot.write(*arrays)
        frame = header.pack(*values(kinds[1], 0)) + _REFERENCE.pack(slot.offset, slot.length)
        return _prefix(len(frame)) + frame
    # The length prefix depends on the padding by at most a few bytes: settle both.
    padding = 0
    for _ in range(2):
        padding = -(len(_prefix(header.size + padding + body)) + header.size) % 8
    prefix = _prefix(header.size + padding + body)
    return b"".join((prefix, header.pack(*values(kinds[0], padding)), bytes(padding), *arrays))


def _prefix(length: int) -> bytes:
    """What protobuf puts before `length` bytes of field 1."""
    out = bytearray([_FIELD_1_BYTES])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


def _frame(message: bytes) -> memoryview:
    """The bytes of field 1. Exactly one field, its length in the shortest form: what every protobuf writer produces."""
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
    if length != len(message) - position - 1 or length > MAX_FRAME_BYTES or message[: position + 1] != _prefix(length):
        raise InvalidInputError("not a frame: the length does not fit the message")
    return memoryview(message)[position + 1 :]


def _header(frame: memoryview, header: struct.Struct) -> tuple[int, ...]:
    if len(frame) < header.size:
        raise InvalidInputError("the frame is shorter than its header")
    return header.unpack_from(frame)


def _check_kind(version: int, kind: int, padding: int, kinds: tuple[int, ...]) -> None:
    if version != VERSION:
        raise InvalidInputError(f"frame version {version} is not spoken here: use version {VERSION}")
    if kind not in kinds or padding > 7:
        raise InvalidInputError("not a frame of the kind that is due here")


def _inline(frame: memoryview, header: struct.Struct, padding: int, size: int) -> npt.NDArray[np.uint8]:
    start = header.size + padding
    if len(frame) != start + size or any(frame[header.size : start]):
        raise InvalidInputError("the frame's length or padding does not fit its header")
    return np.frombuffer(frame, np.uint8, offset=start)


def _reference(frame: memoryview, header: struct.Struct, padding: int) -> tuple[int, int]:
    """(offset, length) of a slot."""
    if padding or len(frame) != header.size + _REFERENCE.size:
        raise InvalidInputError("the frame's length does not fit its header")
    offset, length = _REFERENCE.unpack_from(frame, header.size)
    return offset, length


def _from_slot(slot: Slot, size: int) -> npt.NDArray[np.uint8]:
    """Copied before anything in it is looked at: the peer may change the slot meanwhile."""
    if not size <= slot.length or size > MAX_FRAME_BYTES:
        raise InvalidInputError("a frame that does not fit its slot of the shared memory")
    return slot.read(size)
