"""The collector against a security module that is a function, and its ioctl against one that reads memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
from pathlib import Path
from typing import Any

import cbor2
import pytest

from tensorguard.errors import ConfigurationError, UnavailableError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.nitro import collector
from tensorguard.evidence.nitro.collector import MAX_RESPONSE_BYTES, NitroPlatform, transact_with_device
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.platforms import platform_of
from tensorguard.evidence.report_data import Binding
from tests.support.fake_nsm import FakeModule
from tests.support.synthetic_pki.certificates import NOW

BINDING = Binding(bytes(range(64)), b"n" * 32, b"k" * 91)


def test_the_document_holds_all_three() -> None:
    fake = FakeModule()
    platform = NitroPlatform(fake)
    assert platform.kind is EvidenceKind.NITRO
    collected = platform.collect(BINDING, Role.COPROCESSOR)
    assert fake.requests == [
        {"Attestation": {"user_data": BINDING.report_data, "nonce": BINDING.nonce, "public_key": BINDING.public_key}}
    ]
    assert collected.endorsements == ()
    claims = NitroVerifier([fake.module.root]).verify(collected.evidence, at=NOW)
    assert (claims.report_data, claims.nonce) == (BINDING.report_data, BINDING.nonce)


def test_what_is_empty_is_left_out() -> None:
    fake = FakeModule()
    NitroPlatform(fake).collect(Binding(bytes(64), b"", b""), Role.COPROCESSOR)
    assert fake.requests == [{"Attestation": {"user_data": bytes(64), "nonce": None, "public_key": None}}]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (cbor2.dumps({"Error": "InputTooLarge"}), "refuses: InputTooLarge"),
        (cbor2.dumps({"Attestation": {"document": "text"}}), "something else"),
        (cbor2.dumps({"GetRandom": {"random": b"4"}}), "something else"),
        (cbor2.dumps("Attestation"), "something else"),
        (b"", "not CBOR"),
        (b"\xff", "not CBOR"),
        (b"\x00" * (MAX_RESPONSE_BYTES + 1), "not CBOR"),
    ],
)
def test_a_module_that_answers_something_else(answer: bytes, words: str) -> None:
    with pytest.raises(UnavailableError, match=words):
        NitroPlatform(lambda request: answer).collect(BINDING, Role.COPROCESSOR)


def test_there_is_no_room_for_more() -> None:
    with pytest.raises(ConfigurationError, match="nonce has 513 bytes"):
        NitroPlatform(FakeModule()).collect(Binding(bytes(64), bytes(513), b""), Role.COPROCESSOR)


def test_a_machine_without_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not run in a Nitro enclave"):
        transact_with_device(b"", tmp_path / "nsm")
    if not collector.DEVICE.exists():
        with pytest.raises(ConfigurationError, match="/dev/nsm is not there"):
            platform_of(EvidenceKind.NITRO).collect(BINDING, Role.COPROCESSOR)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "nsm"
    path.touch()
    return path


def test_the_ioctl_passes_two_buffers(monkeypatch: pytest.MonkeyPatch, device: Path) -> None:
    fake = FakeModule()

    def ioctl(_descriptor: int, code: int, message: Any) -> int:
        assert code == 0xC0200A00
        assert ctypes.sizeof(message) == 32
        assert message.response.length == MAX_RESPONSE_BYTES
        answer = fake(ctypes.string_at(message.request.base, message.request.length))
        ctypes.memmove(message.response.base, answer, len(answer))
        message.response.length = len(answer)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    platform = NitroPlatform(lambda request: transact_with_device(request, device))
    assert isinstance(platform.collect(BINDING, Role.COPROCESSOR), Evidence)


def test_a_device_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, device: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be used"):
        transact_with_device(b"request", device)  # a file has no ioctl

    def ioctl(*_: Any) -> int:
        raise OSError(errno.EMSGSIZE, "Message too long")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(UnavailableError, match="Message too long"):
        transact_with_device(b"request", device)
