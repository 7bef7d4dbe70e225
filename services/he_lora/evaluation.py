"""One frame in, one frame out: checks, metering, evaluation. From outside, all failures look the same, but that a lease
is over or a budget spent."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping

import structlog

from services.he_lora.adapters import AdapterStore
from services.he_lora.sessions import Session
from tensorguard.errors import BudgetExhaustedError, InvalidInputError, LeaseExpiredError, TenSafeError
from tensorguard.observability.logging import frames_of
from tensorguard.observability.metrics import HE_BYTES, HE_FRAMES, HE_OP_LATENCY, HE_OPERATIONS
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb
from tensorguard.session import frames

log = structlog.get_logger(__name__)

_FORWARD_PASS = HE_OP_LATENCY.labels("forward_pass")
_RECEIVED, _SENT = HE_BYTES.labels("received"), HE_BYTES.labels("sent")
_INLINE, _SHARED = HE_FRAMES.labels("inline"), HE_FRAMES.labels("shared_memory")
_CODES: Mapping[type[Exception], int] = {
    LeaseExpiredError: frames.LEASE_EXPIRED,
    BudgetExhaustedError: frames.BUDGET_EXHAUSTED,
}


class Evaluation:
    """Answers request frames of all sessions. Thread-safe; numba kernels release the interpreter lock."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()

    def answer(self, session: Session, message: bytes) -> bytes:
        """A response frame, or a failure frame; the cause is logged here, without values."""
        started = time.perf_counter_ns()
        try:
            request = frames.read_request(message, session.parameters, session.memory)
            response = self._evaluate(session, request, started)
            answer = frames.write_response(response, request.slot)
        except Exception as error:
            request_id = frames.request_id_of(message)
            _log_first(session, error)
            if request_id is None:
                # This ends the stream.
                raise InvalidInputError(f"not a request frame of version {frames.VERSION}") from None
            failure = frames.write_failure(request_id, _CODES.get(type(error), frames.DELTA_UNAVAILABLE))
            _RECEIVED.inc(len(message))
            _SENT.inc(len(failure))
            return failure
        _FORWARD_PASS.observe(response.evaluate_ns / 1e6)
        received = frames.carried_bytes(message, session.parameters)
        sent = frames.carried_bytes(answer, session.parameters)
        (_INLINE if request.slot is None else _SHARED).inc()
        self._count(session, response.counts, received, sent)
        return answer

    def _evaluate(self, session: Session, request: frames.EvaluationRequest, started: int) -> frames.EvaluationResponse:
        if request.request_id <= session.last_request:
            raise InvalidInputError("a request id was used before: requests are never repeated")
        session.last_request = request.request_id
        adapter = self._store.get(session.adapter(request.adapter_handle))
        group = adapter.group(request.layer, request.group)
        evaluator = session.key(request.key_number)
        if request.plan not in group.plans:
            raise InvalidInputError("the plan was not compiled into the package for this group")
        if len(request.ids) != request.plan.uploads(request.tokens, group.d_in):
            raise InvalidInputError("the number of ciphertexts does not fit the plan")
        adapter.meter.charge(request.layer, request.group, request.tokens)
        before = evaluator.counters
        earlier = (before.transforms, before.products, before.additions)
        rerandomised, switched = before.rerandomisations, before.modulus_switches
        rows = evaluator.evaluate(group, request.plan, request.tokens, request.ids, request.seeds, request.b)
        after = evaluator.counters
        return frames.EvaluationResponse(
            request_id=request.request_id,
            c1=rows.c1,
            c0=rows.c0,
            evaluate_ns=time.perf_counter_ns() - started,
            counts=frames.OperationCounts(
                ntt=after.transforms - earlier[0],
                products=after.products - earlier[1],
                additions=after.additions - earlier[2],
                rerandomisations=after.rerandomisations - rerandomised,
                modulus_switches=after.modulus_switches - switched,
            ),
        )

    def ended(self, session: Session) -> None:
        """Log how many requests of a session's stream were refused, beyond those that have lines of their own."""
        if session.refused.total() > len(session.refused):
            log.warning("evaluations refused in this session", requests=dict(session.refused))

    def _count(self, session: Session, counts: frames.OperationCounts, received: int, sent: int) -> None:
        operations = counts._asdict()
        session.operations.update(operations)
        for name, amount in operations.items():
            HE_OPERATIONS[name].inc(amount)
        _RECEIVED.inc(received)
        _SENT.inc(sent)
        with self._lock:
            self._totals.update(**operations, bytes_received=received, bytes_sent=sent)

    def totals(self) -> pb.OperationCounts:
        """Operations and charged tokens since start."""
        with self._lock:
            return pb.OperationCounts(tokens=self._store.tokens_charged, **self._totals)


def _log_first(session: Session, error: Exception) -> None:
    """One line for each reason in a session: a host can send bad frames faster than a disk takes lines."""
    reason = error.reason if isinstance(error, TenSafeError) else type(error).__name__
    session.refused[reason] += 1
    if session.refused[reason] > 1:
        return
    if isinstance(error, TenSafeError):
        log.warning("evaluation refused", reason=reason, cause=error.message)
    else:
        log.error("evaluation failed", error_type=reason, frames=frames_of(error))
