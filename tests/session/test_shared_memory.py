"""Shared memory: the region, who may open it, what a crash leaves, and what a malicious peer can do with it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.he_lora import evaluation, servicer
from tensorguard.ckks import kernels
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.errors import (
    AuthenticationError,
    DeltaUnavailableError,
    InvalidInputError,
    PermissionDeniedError,
    UnavailableError,
)
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.observability.metrics import HE_FRAMES
from tensorguard.session import frames, shared_memory
from tensorguard.session.client import CoprocessorSession, SessionOptions
from tensorguard.session.handshake import HostHandshake
from tensorguard.session.shared_memory import (
    PAGE,
    OfferedRegion,
    SharedRegion,
    Slot,
    SlotAllocator,
    offer_region,
    open_offered_region,
    sweep_abandoned_regions,
)
from tests.support.coprocessor import ADAPTER, World, running_world
from tests.support.raw_host import PARAMETERS, RawHost

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own in the place of /dev/shm: other processes' regions are not ours to look at."""
    own = Path(f"/dev/shm/tensafe-tests-{os.getpid()}") if Path("/dev/shm").is_dir() else tmp_path_factory.mktemp("shm")
    own.mkdir(exist_ok=True)
    monkeypatch.setattr(shared_memory, "FOLDER", own)
    return own


@pytest.fixture(autouse=True, scope="module")
def no_folder_is_left() -> Iterator[None]:
    yield
    own = Path(f"/dev/shm/tensafe-tests-{os.getpid()}")
    if own.is_dir():
        own.rmdir()  # fails if a test left something


@pytest.fixture
def offered(folder: Path) -> Iterator[OfferedRegion]:
    made = offer_region(MIB)
    yield made
    for path in folder.iterdir():
        path.unlink()


# The region


def test_both_sides_have_the_same_bytes(offered: OfferedRegion, folder: Path) -> None:
    region, challenge = open_offered_region(offered.name, MIB, MIB)
    assert challenge == offered.challenge != bytes(32)
    offered.withdraw()
    assert not list(folder.iterdir())
    offered.region.write(PAGE, b"up", np.arange(3, dtype=np.uint32))
    assert region.read(PAGE, 14).tobytes() == b"up" + np.arange(3, dtype="<u4").tobytes()
    region.write(PAGE, b"down")
    assert offered.region.read(PAGE, 4).tobytes() == b"down"


def test_a_region_is_private_reserved_and_random(offered: OfferedRegion, folder: Path) -> None:
    status = (folder / offered.name).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_size == MIB and status.st_blocks * 512 >= MIB
    assert not os.get_inheritable(offered.region._descriptor)
    other = offer_region(MIB)
    assert other.name != offered.name and other.challenge != offered.challenge


def test_umask_does_not_widen_or_narrow(folder: Path) -> None:
    before = os.umask(0o777)
    try:
        offered = offer_region(PAGE)
    finally:
        os.umask(before)
    open_offered_region(offered.name, PAGE, PAGE)
    offered.withdraw()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, MIB + 1), (MIB, 1), (2**63, 1), (2**64 - 1, 2), (0, -1)])
def test_nothing_outside_is_read_or_written(offered: OfferedRegion, offset: int, length: int) -> None:
    with pytest.raises(InvalidInputError, match="outside"):
        offered.region.read(offset, length)
    with pytest.raises(InvalidInputError, match="outside"):
        offered.region.slot(offset, length)
    if length > 0:
        with pytest.raises(InvalidInputError, match="outside"):
            offered.region.write(offset, bytes(min(length, MIB + 1)) if offset >= 0 else b"x")


def test_what_is_read_stays_as_it_was(offered: OfferedRegion) -> None:
    offered.region.write(0, b"a" * 100)
    copy = offered.region.read(0, 100)
    offered.region.write(0, b"b" * 100)
    assert copy.tobytes() == b"a" * 100


def test_a_truncated_region_is_a_short_read_and_no_crash(offered: OfferedRegion) -> None:
    region, _ = open_offered_region(offered.name, MIB, MIB)
    os.ftruncate(offered.region._descriptor, PAGE)
    with pytest.raises(InvalidInputError, match="shorter"):
        region.read(MIB // 2, 100)


def test_it_closes_with_its_last_user(offered: OfferedRegion) -> None:
    region, _ = open_offered_region(offered.name, MIB, MIB)
    descriptor, slot = region._descriptor, region.slot(0, PAGE)
    del region
    os.fstat(descriptor)
    del slot
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize("size", [0, PAGE - 1, PAGE + 1, shared_memory.MAX_BYTES + PAGE])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(InvalidInputError):
        offer_region(size)


def test_no_memory_left(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError, match="No space left"):
        offer_region(MIB)
    assert not list(folder.iterdir())


# Who may be opened


def other_name(folder: Path, offered: OfferedRegion) -> str:
    return f"tensafe-{'0' * 32}"


def symlink(folder: Path, offered: OfferedRegion) -> str:
    (folder / other_name(folder, offered)).symlink_to(folder / offered.name)
    return other_name(folder, offered)


def hard_link(folder: Path, offered: OfferedRegion) -> str:
    os.link(folder / offered.name, folder / other_name(folder, offered))
    return offered.name


def wider_mode(folder: Path, offered: OfferedRegion) -> str:
    (folder / offered.name).chmod(0o660)
    return offered.name


def shorter(folder: Path, offered: OfferedRegion) -> str:
    os.truncate(folder / offered.name, PAGE)
    return offered.name


def longer(folder: Path, offered: OfferedRegion) -> str:
    os.truncate(folder / offered.name, 2 * MIB)
    return offered.name


def fifo(folder: Path, offered: OfferedRegion) -> str:
    os.mkfifo(folder / other_name(folder, offered), 0o600)
    return other_name(folder, offered)


def directory(folder: Path, offered: OfferedRegion) -> str:
    path = folder / f"tensafe-{'1' * 32}"
    path.mkdir(mode=0o600)
    try:
        open_offered_region(path.name, MIB, MIB)
    finally:
        path.rmdir()
    return path.name


@pytest.mark.parametrize(
    "change", [other_name, symlink, hard_link, wider_mode, shorter, longer, fifo, directory], ids=lambda c: c.__name__
)
def test_only_the_offered_file_is_opened(
    offered: OfferedRegion, folder: Path, change: Callable[[Path, OfferedRegion], str]
) -> None:
    with pytest.raises(InvalidInputError):
        open_offered_region(change(folder, offered), MIB, MIB)


def test_another_users_file_is_not_opened(offered: OfferedRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InvalidInputError, match="another owner"):
        open_offered_region(offered.name, MIB, MIB)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../etc/passwd",
        "/etc/passwd",
        "tensafe-",
        "tensafe-" + "0" * 31,
        "tensafe-" + "0" * 33,
        "tensafe-" + "A" * 32,
        "tensafe-" + "0" * 32 + "\n",
        "tensafe-" + "0" * 30 + "/x",
        "x/tensafe-" + "0" * 32,
        "tensafe-" + "0" * 31 + "\0",
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(InvalidInputError, match="not the name"):
        open_offered_region(name, MIB, MIB)


def test_the_coprocessors_limit(offered: OfferedRegion) -> None:
    with pytest.raises(InvalidInputError, match="at most"):
        open_offered_region(offered.name, MIB, MIB - PAGE)


# Slots


@given(st.lists(st.one_of(st.integers(1, 5 * PAGE), st.integers(-20, -1)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_slots_never_overlap_and_all_come_back(steps: list[int]) -> None:
    """Positive: take so many bytes. Negative: give one of the taken slots back."""
    region = SharedRegion(os.open("/dev/null", os.O_RDWR), 16 * PAGE)
    slots, taken = SlotAllocator(region), []
    for step in steps:
        if step > 0 and (slot := slots.take(step)) is not None:
            assert slot.length >= step and slot.offset + slot.length <= region.size
            assert all(slot.offset >= t.offset + t.length or t.offset >= slot.offset + slot.length for t in taken)
            taken.append(slot)
        elif step < 0 and taken:
            slots.give_back(taken.pop(step % len(taken)))
    for slot in taken:
        slots.give_back(slot)
    whole = slots.take(region.size)
    assert whole is not None and slots.take(1) is None


def test_a_slot_is_given_back_once(offered: OfferedRegion) -> None:
    slots = SlotAllocator(offered.region)
    slot = slots.take(1)
    assert slot is not None
    slots.give_back(slot)
    with pytest.raises(KeyError):
        slots.give_back(slot)


# Crashes

CHILD = """
import sys, time
from pathlib import Path
from tensorguard.session import shared_memory
shared_memory.FOLDER = Path(sys.argv[1])
if sys.argv[2] == "offer":
    offered = shared_memory.offer_region(1 << 20)
    print(offered.name, flush=True)
else:
    region, challenge = shared_memory.open_offered_region(sys.argv[2], 1 << 20, 1 << 20)
    print(challenge.hex(), flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def child(folder: Path, what: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), what], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_process_proves_that_it_reads_the_same_memory(offered: OfferedRegion, folder: Path) -> None:
    with child(folder, offered.name) as (_, challenge):
        assert challenge == offered.challenge.hex()
        offered.withdraw()
    assert not list(folder.iterdir()), "killed after the negotiation: nothing is left"


def test_a_host_killed_in_the_negotiation_leaves_what_the_next_start_removes(folder: Path) -> None:
    with child(folder, "offer") as (process, name):
        assert [path.name for path in folder.iterdir()] == [name]
        sweep_abandoned_regions()
        assert [path.name for path in folder.iterdir()] == [name], "its process lives"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (folder / name).exists()
        sweep_abandoned_regions()
        assert not list(folder.iterdir())


def test_sweeping_removes_nothing_else(folder: Path) -> None:
    names = ["tensafe-notes", "psm_1234", "tensafe-" + "g" * 32]
    for name in names:
        (folder / name).touch()
    sweep_abandoned_regions()
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        (folder / name).unlink()


# In a session


@contextlib.contextmanager
def opened(world: World, endpoint: str | None = None, **options: Any) -> Iterator[CoprocessorSession]:
    session = CoprocessorSession.open(
        endpoint or world.endpoint,
        world.workload(),
        verify_keys=[world.publisher.public],
        options=SessionOptions(**{"reply_seconds": 60.0} | options),
    )
    with session:
        session.attach(ADAPTER)
        yield session


def region_of(session: CoprocessorSession) -> SharedRegion | None:
    assert session._link is not None
    slots = session._link.stream._slots
    return None if slots is None else slots._region


def shared_frames() -> float:
    """Sent and answered: both sides count, and here they are one process."""
    value: float = HE_FRAMES.labels("shared_memory")._value.get()
    return value


def x(tokens: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(tokens, 48))


def delta(session: CoprocessorSession, tokens: int, seed: int = 0) -> Any:
    return session.begin(ADAPTER, 0, "qkv", x(tokens, seed)).wait()


def close_to(left: Any, right: Any) -> bool:
    return bool(np.abs(left - right).max() < 1e-3 * np.abs(right).max())


@pytest.mark.parametrize("tokens", [1, 8, 150])
def test_results_are_those_of_inline_frames(world: World, folder: Path, tokens: int) -> None:
    before = shared_frames()
    with opened(world) as shared, opened(world, shared_memory_bytes=0) as inline:
        assert region_of(shared) is not None and region_of(inline) is None
        assert not list(folder.iterdir()), "the name is gone as soon as both have it open"
        expected = delta(inline, tokens)
        assert shared_frames() == before
        assert close_to(delta(shared, tokens), expected)
        assert shared_frames() == before + 2
        slack = 200 * len(frames.OPERATIONS)
        for name in ("bytes_up", "bytes_down"):
            assert abs(getattr(shared.stats, name) - getattr(inline.stats, name)) < slack


def test_equal_ciphertexts_give_equal_responses_but_for_their_randomness(world: World) -> None:
    """The same bytes through either transport are the same request: ids, seeds and residues."""
    with RawHost(world) as host:
        host.begin()
        host.complete()
        host.attach()
        region = host.share()
        host.stream()
        slot = region.slot(PAGE, 64 * PAGE)
        request, encrypted = host.request(3)
        shared = frames.write_request(frames.EvaluationRequest(**fields_of(request) | {"slot": slot}))
        there = frames.read_request(shared, PARAMETERS, region)
        here = frames.read_request(frames.write_request(request), PARAMETERS)
        assert np.array_equal(there.b, here.b) and np.array_equal(there.ids, here.ids) and there.seeds == here.seeds
        answer = host.send(shared, slot)
        assert isinstance(answer, frames.EvaluationResponse)
        assert host.key is not None
        z = host.key.decrypt(encrypted, as_rows(answer), 12, np.ones(12))
        assert np.isfinite(z).all()


def fields_of(request: frames.EvaluationRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in frames.EvaluationRequest.__slots__}


def as_rows(answer: frames.EvaluationResponse) -> Any:
    return EvaluatedRows(c1=answer.c1, c0=answer.c0)


def test_many_in_flight_and_slots_are_used_again(world: World) -> None:
    with opened(world, shared_memory_bytes=MIB) as session, opened(world, shared_memory_bytes=0) as inline:
        expected = {seed: delta(inline, 2, seed) for seed in range(4)}
        for _ in range(8):
            pending = [(seed, session.begin(ADAPTER, 0, "qkv", x(2, seed))) for seed in range(4)]
            for seed, waiting in reversed(pending):
                assert close_to(waiting.wait(), expected[seed])
        assert session._link is not None and session._link.stream._slots is not None
        assert session._link.stream._slots.take(MIB) is not None, "every slot came back"


def test_a_full_region_sends_inline(world: World) -> None:
    with opened(world, shared_memory_bytes=16 * PAGE) as session:
        before, inline = shared_frames(), HE_FRAMES.labels("inline")._value.get()
        pending = [session.begin(ADAPTER, 0, "qkv", x(2, seed)) for seed in range(6)]
        for waiting in pending:
            waiting.wait()
        delta(session, 150)  # needs more than the region has
        assert shared_frames() > before and HE_FRAMES.labels("inline")._value.get() > inline


def test_several_threads(world: World) -> None:
    failures: list[BaseException] = []
    with opened(world, shared_memory_bytes=MIB) as session, opened(world, shared_memory_bytes=0) as inline:
        expected = [delta(inline, 2, seed) for seed in range(3)]

        def run(seed: int) -> None:
            try:
                for _ in range(6):
                    assert close_to(delta(session, 2, seed), expected[seed])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def open_regions() -> int:
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(path.readlink()))
    return sum("tensafe-" in link for link in links)


def none_is_open() -> bool:
    deadline = time.monotonic() + 10
    while open_regions() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not open_regions()


def test_descriptors_are_closed_with_the_session(world: World) -> None:
    gc.collect()  # what other tests left
    assert none_is_open()
    with opened(world) as session:
        delta(session, 1)
        assert open_regions() == 2, "one on each side"
    assert none_is_open()


# Negotiation that fails: inline, and nothing is left


def test_turned_off_at_the_coprocessor(tmp_path: Path) -> None:
    with running_world(tmp_path, shared_memory_bytes=0) as world, opened(world) as session:
        assert region_of(session) is None
        delta(session, 1)
        with RawHost(world) as host:
            host.begin()
            host.complete()
            with pytest.raises(PermissionDeniedError, match="shared_memory_bytes is 0"):
                host.share()


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("10.0.0.7:1", False), ("he-lora:1", False)],
)
def test_only_a_loopback_address_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, endpoint: str, local: bool
) -> None:
    asked: list[int] = []

    def ask(size: int) -> Any:
        asked.append(size)
        raise UnavailableError("test")

    monkeypatch.setattr("tensorguard.session.handshake.offer_region", ask)
    with opened(world) as session:
        assert session._link is not None and asked == [16 * MIB]
        handshake = session._link.handshake
        monkeypatch.setattr(handshake, "endpoint", endpoint)
        asked.clear()
        assert handshake.share_memory(MIB) is None and asked == ([MIB] if local else [])
        assert handshake.share_memory(0) is None and len(asked) == local


def test_a_coprocessor_that_cannot_see_the_memory(world: World, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As in containers: the host's /dev/shm is another one than the coprocessor's, so the name is not there."""
    absent = "tensafe-" + "0" * 32
    monkeypatch.setattr(servicer, "open_offered_region", lambda _, *sizes: open_offered_region(absent, *sizes))
    with opened(world) as session:
        assert region_of(session) is None and not list(folder.iterdir())
        delta(session, 1)


def test_a_coprocessor_that_guesses_the_challenge(world: World, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(servicer, "open_offered_region", lambda *a: (open_offered_region(*a)[0], bytes(32)))
    with opened(world) as session:
        assert region_of(session) is None and not list(folder.iterdir())
        delta(session, 1)


def test_a_proof_by_another_key(world: World) -> None:
    handshake = HostHandshake.begin(world.endpoint, world.workload(), PARAMETERS, 5.0, 10.0, 2.0)
    handshake.announce_key()
    handshake.peer = dataclasses.replace(handshake.peer, identity=WorkloadIdentity.generate().public)
    assert handshake.share_memory(MIB) is None
    handshake.end()


# Hosts and coprocessors that cheat


@pytest.fixture
def host(world: World) -> Iterator[RawHost]:
    with RawHost(world) as opened_host:
        opened_host.begin()
        opened_host.complete()
        opened_host.attach()
        yield opened_host


def test_the_offer_must_be_signed_by_the_attested_host(host: RawHost, offered: OfferedRegion) -> None:
    for signature in (b"", b"x" * 70):
        with pytest.raises(AuthenticationError):
            host.share(offered, signature=signature)
    assert host.transcript is not None
    other = host.workload.identity.sign(host.transcript.shared_memory_offer(offered.name, 2 * MIB))
    with pytest.raises(AuthenticationError):
        host.share(offered, signature=other)


def test_memory_is_shared_once_and_before_the_stream(host: RawHost) -> None:
    host.share()
    with pytest.raises(PermissionDeniedError, match="shared once"):
        host.share()


def test_not_after_the_stream_began(host: RawHost, offered: OfferedRegion) -> None:
    host.stream()
    assert isinstance(host.evaluate(), frames.EvaluationResponse)
    with pytest.raises(PermissionDeniedError, match="before the session's stream"):
        host.share(offered)


@pytest.mark.parametrize("name", ["../../etc/passwd", "tensafe-" + "0" * 32, ""])
def test_offers_of_something_else(host: RawHost, offered: OfferedRegion, name: str) -> None:
    with pytest.raises(InvalidInputError):
        host.share(offered, name=name)


def test_an_offer_larger_than_the_coprocessors_limit(host: RawHost, offered: OfferedRegion) -> None:
    with pytest.raises(InvalidInputError, match="at most"):
        host.share(offered, size=1 << 29)


def streaming(host: RawHost) -> SharedRegion:
    region = host.share()
    host.stream()
    return region


def by_reference(host: RawHost, slot: Slot) -> bytes:
    request, _ = host.request()
    return frames.write_request(frames.EvaluationRequest(**fields_of(request) | {"slot": slot}))


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (MIB - PAGE, 64 * PAGE),
        (MIB, 64 * PAGE),
        (2**63, 64 * PAGE),
        (2**64 - PAGE, 64 * PAGE),
        (0, 2**64 - 1),
        (0, PAGE),
    ],
)
def test_references_out_of_range(host: RawHost, offset: int, length: int) -> None:
    region = streaming(host)
    message = bytearray(by_reference(host, region.slot(0, 64 * PAGE)))
    message[-16:] = offset.to_bytes(8, "little") + length.to_bytes(8, "little")
    assert host.send(bytes(message)) == frames.EvaluationFailure(host.request_id)
    assert isinstance(host.evaluate(), frames.EvaluationResponse), "the session lives on"


def test_references_without_shared_memory(host: RawHost, offered: OfferedRegion) -> None:
    host.stream()
    assert host.send(by_reference(host, offered.region.slot(0, 64 * PAGE))) == frames.EvaluationFailure(1)


def test_overlapping_slots_hurt_only_their_host(host: RawHost) -> None:
    """Frames are answered in order and read before they are answered: an overlap is lost data of the host alone."""
    region = streaming(host)
    slot, shifted = region.slot(0, 64 * PAGE), region.slot(PAGE, 64 * PAGE)
    messages = [by_reference(host, slot), by_reference(host, shifted)]
    for message in messages:
        host.outgoing.put(message)
    answers = [next(host.answers) for _ in messages]
    assert [frames.answered_request(answer) for answer in answers] == [1, 2]
    assert isinstance(host.evaluate(), frames.EvaluationResponse), "the session lives on"


def test_a_host_that_changes_the_memory_after_it_was_checked(host: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time of check, time of use: residues over the primes appear between the evaluator's check and its use."""
    region = streaming(host)
    slot = region.slot(0, 64 * PAGE)
    request, encrypted = host.request()
    check, seen = kernels.all_reduced, []

    def then_change(polynomials: Any, primes: Any) -> bool:
        before = polynomials.copy()
        found: bool = check(polynomials, primes)
        region.write(0, b"\xff" * (64 * PAGE))
        seen.append(np.array_equal(polynomials, before))
        return found

    monkeypatch.setattr(kernels, "all_reduced", then_change)
    answer = host.send(frames.write_request(frames.EvaluationRequest(**fields_of(request) | {"slot": slot})), slot)
    assert seen == [True] and isinstance(answer, frames.EvaluationResponse)
    assert host.key is not None
    host.key.decrypt(encrypted, as_rows(answer), 12, np.ones(12))


def test_a_host_that_truncates_the_memory(host: RawHost) -> None:
    region = streaming(host)
    message = by_reference(host, region.slot(0, 64 * PAGE))
    os.ftruncate(region._descriptor, 0)
    assert host.send(message) == frames.EvaluationFailure(host.request_id)
    assert isinstance(host.evaluate(), frames.EvaluationResponse), "the session lives on"


def test_a_response_that_changes_while_it_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's copy is what it decrypts, whatever the coprocessor does to the slot afterwards."""
    read = frames.read_response

    def then_change(message: bytes, parameters: Any, slot: Any = None) -> Any:
        response = read(message, parameters, slot)
        assert slot is not None
        slot.write(b"\xff" * slot.length)
        return response

    with opened(world) as session, opened(world, shared_memory_bytes=0) as inline:
        expected = delta(inline, 3)
        monkeypatch.setattr(frames, "read_response", then_change)
        assert close_to(delta(session, 3), expected)


def test_a_response_in_anothers_slot_destroys_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write = frames.write_response

    def elsewhere(response: Any, slot: Any = None) -> bytes:
        return write(response, slot and Slot(slot.region, slot.offset + PAGE, slot.length))

    with opened(world) as session:
        assert session._link is not None
        key = session._link.key.host
        monkeypatch.setattr(evaluation.frames, "write_response", elsewhere)
        with pytest.raises(DeltaUnavailableError):
            delta(session, 1)
        assert key.closed and not session.healthy


def test_a_coprocessor_killed_leaves_nothing(folder: Path, offered: OfferedRegion) -> None:
    with child(folder, offered.name) as (process, _):
        offered.withdraw()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not list(folder.iterdir())
    offered.region.write(0, b"still ours")
