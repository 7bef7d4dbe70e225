"""The kept fuzz inputs once more, without atheris, and that the targets notice what they are there for."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.edits import message_from
from fuzz.evidence_target import EVIDENCE_TARGETS, snp_target, tdx_target
from fuzz.frames_target import frames_target
from fuzz.manifest_target import manifest_target
from fuzz.memory import MemoryBoundError
from fuzz.sessions_target import sessions_target
from fuzz.shared_memory_target import shared_memory_target
from fuzz.target import Target
from services.he_lora.evaluation import Evaluation
from tensorguard.evidence.snp import verifier as snp_verifier
from tensorguard.evidence.tdx import verifier as tdx_verifier
from tensorguard.package import envelope
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames
from tensorguard.session.shared_memory import SharedRegion, Slot
from tensorguard.session.stream import Reply

REPAIR = bytes([16, 0, 0, 0, 0])
FLIP_MEASUREMENT = bytes([0, 0, 2, 0x90, 0, 0, 0])
"""Of the first case the evidence; flip bit 0 of byte 0x90."""


@pytest.fixture(scope="module")
def on_frames() -> Target:
    return frames_target()


@pytest.fixture(scope="module")
def on_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with sessions_target(tmp_path_factory.mktemp("sessions")) as target:
        yield target


@pytest.fixture(scope="module")
def on_shared_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with shared_memory_target(tmp_path_factory.mktemp("shared_memory")) as target:
        yield target


def replay(target: Target) -> None:
    corpus = target.corpus()
    assert len(corpus) > len(list(target.seeds)), "fuzz/corpus has nothing for this target"
    for data in corpus:
        try:
            target.run(data)
        except Exception as error:
            raise AssertionError(f"{target.name} fails on the input {data.hex()}") from error


def test_frames(on_frames: Target) -> None:
    replay(on_frames)


def test_sessions(on_sessions: Target) -> None:
    replay(on_sessions)


def test_shared_memory(on_shared_memory: Target) -> None:
    replay(on_shared_memory)


def test_manifest() -> None:
    replay(manifest_target())


@pytest.mark.parametrize("kind", EVIDENCE_TARGETS)
def test_evidence(kind: str) -> None:
    replay(EVIDENCE_TARGETS[kind]())


def test_a_verifier_that_raises_anything_else_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tdx_target()
    monkeypatch.setattr(tdx_verifier, "check_chain", lambda _chain: (_ for _ in ()).throw(KeyError("a field")))
    with pytest.raises(KeyError):
        target.run(b"\0\0")


def test_accepted_evidence_that_says_something_else_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tdx_target()
    monkeypatch.setattr(tdx_verifier, "_claims", lambda *_: None)
    with pytest.raises(AssertionError):
        target.run(b"\0\0")


def test_a_signature_that_is_not_looked_at_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of the measurement is another one then."""
    target = snp_target()
    target.run(FLIP_MEASUREMENT)
    monkeypatch.setattr(snp_verifier, "_is_signed_by", lambda *_: True)
    with pytest.raises(AssertionError):
        target.run(FLIP_MEASUREMENT)


def test_unexpected_exception_is_a_finding(on_frames: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a field")

    monkeypatch.setattr(frames, "read_request", broken)
    with pytest.raises(KeyError):
        on_frames.run(b"\0\0")


def test_allocation_beyond_the_message_is_a_finding(on_frames: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    original = frames.request_id_of

    def greedy(message: bytes) -> int | None:
        np.zeros(16 * 1024 * 1024, np.uint8)
        return original(message)

    monkeypatch.setattr(frames, "request_id_of", greedy)
    with pytest.raises(MemoryBoundError, match="bytes for a message of"):
        on_frames.run(b"\0\0")


def test_error_behind_the_failure_frame_is_a_finding(on_sessions: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coprocessor answers every failure in the same way; the target looks at what was behind it."""

    def broken(*_: Any) -> None:
        raise IndexError("an array")

    monkeypatch.setattr(Evaluation, "_evaluate", broken)
    with pytest.raises(AssertionError, match="IndexError"):
        on_sessions.run(bytes([0, 1, 0]))


def test_honest_messages_are_answered(on_sessions: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the target would only ever see refusals."""
    answered = []
    original = Evaluation.answer

    def recording(self: Evaluation, session: Any, message: bytes) -> bytes:
        answered.append(original(self, session, message))
        return answered[-1]

    monkeypatch.setattr(Evaluation, "answer", recording)
    on_sessions.run(bytes([0, 1, 0, 0, 1, 1, 0, 1, 2, 0, 1, 1]))
    lengths = [len(answer) for answer in answered]
    assert min(lengths[:3]) > 10_000 > 100 > lengths[3], "three answers, and a failure for the repetition"


def test_manifest_of_another_form_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    target = manifest_target()
    target.run(b"\0\0")

    def broken(_: bytes) -> None:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "a name")

    monkeypatch.setattr(envelope, "parse_manifest", broken)
    with pytest.raises(UnicodeDecodeError):
        target.run(b"\0\0")


# Shared memory

TO_COPROCESSOR, TO_HOST = 0, 1
TWO_MESSAGES = bytes([0, 1, 0, 0, 1, 1])
# In the next read, when it has 4 bytes: ones at the place of the second message's arrays (the page of slot 1).
CHANGE = bytes([2, 207, 4, 0, 0, 0, 0, 1, 3]) + b"\xff" * 200
CHANGED = bytes([0, 1, 0]) + CHANGE + bytes([0, 1, 1])


def test_references_are_followed(on_shared_memory: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the target would only ever see refusals."""
    answers: list[bytes] = []
    original = Evaluation.answer

    def recording(self: Evaluation, session: Any, message: bytes) -> bytes:
        answers.append(original(self, session, message))
        return answers[-1]

    monkeypatch.setattr(Evaluation, "answer", recording)
    for data in (TWO_MESSAGES, CHANGED):
        on_shared_memory.run(bytes([TO_COPROCESSOR]) + data)
    kinds = [answer[3] for answer in answers]
    assert kinds == [5, 5, 5, 3], "a response by reference to each but the changed one, whose residues are too large"
    responses: list[Any] = []
    put = Reply.put
    monkeypatch.setattr(Reply, "put", lambda self, response: (responses.append(response), put(self, response))[1])
    for data in (TWO_MESSAGES, CHANGED):
        on_shared_memory.run(bytes([TO_HOST]) + data)
    whole, torn = (responses[i].c1[0] for i in (1, 4))
    assert torn[0] == whole[0] and (torn[1:10] == 2**30 - 1).all(), "the change came when the read had begun"


@pytest.mark.parametrize("side", [TO_COPROCESSOR, TO_HOST])
def test_reading_twice_is_a_finding(on_shared_memory: Target, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    def twice(slot: Slot, size: int) -> Any:
        return np.concatenate([slot.read(size)[:100], slot.read(size)[100:]])

    monkeypatch.setattr(frames, "_from_slot", twice)
    with pytest.raises(AssertionError, match="AssertionError" if side == TO_COPROCESSOR else "one read gave, of 2"):
        on_shared_memory.run(bytes([side]) + CHANGED)


@pytest.mark.parametrize("side", [TO_COPROCESSOR, TO_HOST])
def test_mapping_the_region_is_a_finding(on_shared_memory: Target, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    def mapped(self: SharedRegion, offset: int, length: int) -> Any:
        with mmap.mmap(self._descriptor, self.size) as mapping:
            return np.frombuffer(mapping[offset : offset + length], np.uint8)

    monkeypatch.setattr(SharedRegion, "read", mapped)
    with pytest.raises(AssertionError, match="AssertionError" if side == TO_COPROCESSOR else "one read gave, of 0"):
        on_shared_memory.run(bytes([side]) + TWO_MESSAGES)


def test_writing_beside_the_slot_is_a_finding(on_shared_memory: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "write", lambda self, *arrays: self.region.write(self.offset + 4096, bytes(self.length)))
    with pytest.raises(AssertionError, match="beside the slot"):
        on_shared_memory.run(bytes([TO_COPROCESSOR]) + TWO_MESSAGES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_dies_is_a_finding(on_shared_memory: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a field")

    monkeypatch.setattr(frames, "read_response", broken)
    with pytest.raises(AssertionError, match="told nobody"):
        on_shared_memory.run(bytes([TO_HOST]) + TWO_MESSAGES)


# Edits


MESSAGES = [pb.EvaluateRequest(frame=bytes(range(200))).SerializeToString(), b"\x0a\x01x"]


def test_inputs_without_edits_are_the_messages() -> None:
    assert [message_from(bytes([i]), MESSAGES) for i in (0, 1)] == MESSAGES
    assert message_from(b"\x02the rest", MESSAGES) == b"the rest"
    assert message_from(b"", MESSAGES) == b""


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=60))
def test_any_input_is_a_message_of_bounded_size(data: bytes) -> None:
    assert len(message_from(data, MESSAGES)) <= 256 + len(data) * 2**12


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(2, 5), st.integers(4, 150), st.integers(0, 255)), max_size=4))
def test_repaired_length_is_that_of_the_message(edits: list[tuple[int, int, int]]) -> None:
    """Cut or fill the body anywhere behind the prefix: with the repair, protobuf reads what is left."""
    changes = b"".join(bytes([2 * (operation // 2) + 2, *at.to_bytes(3, "little"), v]) for operation, at, v in edits)
    message = message_from(b"\0" + changes + REPAIR, MESSAGES)
    assert pb.EvaluateRequest.FromString(message).SerializeToString() == message or len(message) == 2
