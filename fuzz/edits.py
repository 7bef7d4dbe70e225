"""Fuzz inputs as edits of well-formed messages.

A request frame has 50 kB, nearly all of it residues that no branch looks at, and a length prefix and lengths in its
header that must agree. So an input does not hold a message, but says which well-formed one to start from and what to
change: inputs stay short, and remain useful when the format changes, because the messages come from our own writers.

    input   = selector u8, edits...       selector = number of messages: the rest is the message itself
    edit    = operation u8, position u24, value u8
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

EDIT_BYTES = 5
HEADER_BYTES = 64
"""Half of the operations stay in here: this is where the fields are."""
MAX_INSERTED = 1 << 12

_SMALL = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0xFFFF, 0x10000)
NUMBERS = (*_SMALL, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**48 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
"""Where bounds are likely to be."""


def message_from(data: bytes, messages: Sequence[bytes]) -> bytes:
    """The message that an input stands for."""
    if not data:
        return b""
    selector, edits = data[0] % (len(messages) + 1), data[1:]
    if selector == len(messages):
        return edits
    message = bytearray(messages[selector])
    for start in range(0, len(edits) - EDIT_BYTES + 1, EDIT_BYTES):
        _edit(message, edits[start : start + EDIT_BYTES])
    return bytes(message)


def _edit(message: bytearray, edit: bytes) -> None:
    operation, value = edit[0], edit[4]
    position = int.from_bytes(edit[1:4], "little") % ((HEADER_BYTES if operation & 1 else len(message)) + 1)
    match (operation >> 1) % 9:
        case 0:
            message[position : position + 1] = bytes([value])
        case 1 if position < len(message):
            message[position] ^= 1 << value % 8
        case 2:
            del message[position : position + value]
        case 3:
            message[position:position] = bytes(value)
        case 4:
            del message[position:]
        case 5:
            number = NUMBERS[value % len(NUMBERS)]
            message[position : position + 4] = struct.pack("<I", number & 0xFFFFFFFF)
        case 6:
            number = NUMBERS[value % len(NUMBERS)]
            message[position : position + 8] = struct.pack("<Q", number)
        case 7:
            message += bytes([value]) * min(position, MAX_INSERTED)
        case _:
            _repair_length(message)


def _repair_length(message: bytearray) -> None:
    """Make the length prefix of a protobuf message of one bytes field true again, so that the fields are reached."""
    end = 1
    while end < min(len(message), 6) and message[end] & 0x80:
        end += 1
    body = message[end + 1 :]
    length, prefix = len(body), bytearray(b"\x0a")
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    message[:] = prefix + body
