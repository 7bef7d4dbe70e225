"""The engine process sleeps while a worker computes, and finds the answer soon, notified or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tensorguard.backends.vllm.executor import SleepingExecutor

STEP_SECONDS = 0.5


@pytest.fixture
def worker() -> Iterator[MessageQueue]:
    """The worker's end of the queue of its answers."""
    queue = MessageQueue(1, 1)
    yield queue
    queue.shutdown()


@pytest.fixture
def answers(worker: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[MessageQueue]:
    """The engine's end of it, as the executor leaves it."""

    def start_workers(executor: MultiprocExecutor) -> None:
        queue = MessageQueue.create_from_handle(worker.export_handle(), 0)
        ready = threading.Thread(target=worker.wait_until_ready)
        ready.start()
        queue.wait_until_ready()
        ready.join()
        executor.response_mqs = [queue]

    monkeypatch.setattr(MultiprocExecutor, "_init_executor", start_workers)
    executor = SleepingExecutor.__new__(SleepingExecutor)
    executor._init_executor()
    (queue,) = executor.response_mqs
    yield queue
    queue.shutdown()


def test_waiting_for_a_step_takes_no_core(worker: MessageQueue, answers: MessageQueue) -> None:
    used = []
    for number in range(3):  # the waiting begins just after an answer, when vLLM would look without a pause
        step = threading.Timer(STEP_SECONDS, worker.enqueue, [number])
        step.start()
        begun, used_before = time.monotonic(), time.thread_time()
        assert answers.dequeue(timeout=30) == number
        used.append(time.thread_time() - used_before)
        assert time.monotonic() - begun < STEP_SECONDS + 4.0, "vLLM looks again after 5 s"
        step.join()
    assert max(used) < STEP_SECONDS / 5


def test_answers_that_are_there_already_are_taken(worker: MessageQueue, answers: MessageQueue) -> None:
    for number in range(20):
        worker.enqueue(number)
        assert answers.dequeue(timeout=30) == number


def test_a_lost_notification_costs_no_time(
    worker: MessageQueue, answers: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker._spin_condition, "notify", lambda: None)
    step = threading.Timer(STEP_SECONDS, worker.enqueue, ["late"])
    step.start()
    begun = time.monotonic()
    assert answers.dequeue(timeout=30) == "late"
    assert time.monotonic() - begun < STEP_SECONDS + 4.0, "vLLM looks again after 5 s"
    step.join()
