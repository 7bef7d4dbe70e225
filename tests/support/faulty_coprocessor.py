"""The coprocessor as a process, whose answers a test can spoil: `python -m tests.support.faulty_coprocessor`.

Takes the coprocessor's options. While the file that COPROCESSOR_TEST_FAULT names exists, answers are spoiled in the way
that it says: "values" flips a bit of a residue, "frames" flips a bit of a header.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.he_lora import __main__, server
from services.he_lora.evaluation import Evaluation
from tensorguard.session import frames

FAULT = "COPROCESSOR_TEST_FAULT"
LEAST_BIT = 16
"""Checked mode may miss smaller changes in a frame of 64 tokens (docs/protocol.md). An honest value has 24 bits or so,
of which the lowest four are noise: smaller changes would hardly show in an answer either."""
# Version, kind, shape and request id, and the three counts that must be 0. The rest of a header is for statistics.
HEADER_BITS = (*range(8 * 24), *range(8 * 52, 8 * 64))
HEADER_BYTES = 64


class FaultyEvaluation(Evaluation):
    """The real one; some of what it says is spoiled on the way out."""

    def answer(self, session: Any, message: bytes) -> bytes:
        answer = super().answer(session, message)
        return spoiled_header(answer) if fault() == "frames" and random.random() < 0.3 else answer

    def _evaluate(self, session: Any, request: frames.EvaluationRequest, started: int) -> frames.EvaluationResponse:
        response = super()._evaluate(session, request, started)
        if fault() != "values" or random.random() < 0.5:
            return response
        if random.random() < 0.5:
            return dataclasses.replace(response, c1=flipped(response.c1))
        return dataclasses.replace(response, c0=flipped(response.c0))


def fault() -> str:
    try:
        return Path(os.environ[FAULT]).read_text()
    except FileNotFoundError:
        return ""


def flipped(residues: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """One of the upper bits of one residue, of all that there are."""
    copy = residues.copy()
    copy.flat[random.randrange(copy.size)] ^= np.uint32(1 << random.randrange(LEAST_BIT, 30))
    return copy


def spoiled_header(message: bytes) -> bytes:
    start = 1 + next(n for n in range(1, 6) if message[n] < 0x80)  # behind the length
    if len(message) - start < HEADER_BYTES:
        return message  # a failure already
    bit = random.choice(HEADER_BITS)
    copy = bytearray(message)
    copy[start + bit // 8] ^= 1 << bit % 8
    return bytes(copy)


if __name__ == "__main__":
    server.Evaluation = FaultyEvaluation  # type: ignore[misc]
    sys.exit(__main__.main())
