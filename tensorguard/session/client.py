"""The inference host's session with one coprocessor. Synchronous, numpy only; used by the vLLM hooks.

Opening and attaching raise typed errors that say what to change. Once a session is open, every failure of a
delta is one `DeltaUnavailableError` with one text, whatever happened: failures that differ would tell a
cheating coprocessor about the key. The cause goes to the log, without values. Only a coprocessor that says itself
that the adapter's lease is over or its budget spent is believed: it learns nothing from hearing its own words.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import structlog

from tensorguard.ckks.filler import Filler
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.parameters import DEFAULT_PARAMETER_SET, ParameterSet, get_parameter_set
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    DeltaUnavailableError,
    EvidenceRefusedError,
    InvalidInputError,
    LeaseExpiredError,
    PackageTamperedError,
    RevokedError,
    TenSafeError,
    UnavailableError,
)
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.release import RevocationNotice
from tensorguard.evidence.workload import Workload
from tensorguard.observability.logging import frames_of
from tensorguard.session import frames
from tensorguard.session.adapter import AttachedAdapter, GroupShape, open_adapter
from tensorguard.session.handshake import HostHandshake
from tensorguard.session.keys import KeySchedule, LinkKey
from tensorguard.session.link import Link, SentPart
from tensorguard.session.options import SessionOptions
from tensorguard.session.stats import SessionStats
from tensorguard.session.stream import EvaluationStream
from tensorguard.session.warm_up import warm_up

log = structlog.get_logger(__name__)

_NO_DELTA = "delta unavailable"


class PendingDelta:
    """A delta on its way. `wait` may be called once."""

    __slots__ = ("_link", "_parts", "_session", "_shape")

    def __init__(
        self,
        session: CoprocessorSession,
        link: Link | None,
        shape: GroupShape | None,
        parts: Sequence[SentPart],
    ) -> None:
        self._session, self._link, self._shape, self._parts = session, link, shape, parts

    def wait(self, timeout: float | None = None) -> npt.NDArray[np.float64]:
        """z = A'x, float64 [T, rows] (rows of the group's projections, stacked as the manifest says).

        Raises DeltaUnavailableError when it cannot be had; LeaseExpiredError or BudgetExhaustedError when the
        coprocessor says so; nothing else.
        """
        return self._session._finish(self._link, self._shape, self._parts, timeout)


class CoprocessorSession:
    """See the module. Safe for several threads; frames are sent in the order of `begin`."""

    def __init__(
        self,
        endpoint: str,
        workload: Workload,
        parameters: ParameterSet,
        verify_keys: Sequence[VerifyingKeys],
        options: SessionOptions,
    ) -> None:
        """Use `open`."""
        self.endpoint = endpoint
        self.stats = SessionStats()
        self._workload = workload
        self._parameters = parameters
        self._verify_keys = tuple(verify_keys)
        self._options = options
        self._filler = Filler(2 * options.pool_bytes) if options.pool_bytes else None
        self._adapters: dict[str, AttachedAdapter] = {}
        self._revoked: set[RevocationNotice] = set()
        self._kind: EvidenceKind | None = None
        self._lock = threading.RLock()
        self._opening = threading.Lock()
        self._link: Link | None = None
        self._closed = False
        self._retry_at = 0.0
        self._backoff = options.first_backoff_seconds

    @classmethod
    def open(
        cls,
        endpoint: str,
        workload: Workload,
        *,
        verify_keys: Sequence[VerifyingKeys],
        parameter_set: str = DEFAULT_PARAMETER_SET,
        options: SessionOptions | None = None,
    ) -> CoprocessorSession:
        """Attest as `workload` (role inference), connect to the coprocessor and agree on a key.

        `verify_keys`: publishers whose packages may be attached, at least one. Raises UnavailableError,
        EvidenceRefusedError, TokenError, PermissionDeniedError, AuthenticationError, ConfigurationError.
        """
        if not verify_keys:
            # The evidence says which code the coprocessor runs, not whose package it was given.
            raise ConfigurationError(
                "no publisher key to verify the adapter's manifest with: set publisher_keys (of TenSafeVLLMConfig, or "
                "of the adapter in TENSAFE_INFERENCE_ADAPTERS) to the public key file of who packed it"
            )
        warm_up()
        session = cls(endpoint, workload, get_parameter_set(parameter_set), verify_keys, options or SessionOptions())
        link = session._connect(session._options.connect_seconds)
        session._link, session._kind = link, link.handshake.peer.kind
        return session

    @property
    def evidence_kind(self) -> str:
        """Kind of the coprocessor's evidence: "simulated" or a hardware kind; empty while disconnected."""
        with self._lock:
            return self._link.handshake.peer.kind.value if self._link else ""

    @property
    def healthy(self) -> bool:
        """Whether `begin` can be answered as far as is known."""
        with self._lock:
            return self._link is not None and self._link.alive

    def attach(self, adapter: str) -> AttachedAdapter:
        """Fetch an adapter's manifest and basis. Raises NotFoundError, PackageError, AuthenticationError, ..."""
        with self._lock:
            link = self._link
            if link is None or not link.alive:
                raise UnavailableError(f"the session with {self.endpoint} is not open")
            attached = self._attach(link.handshake, link.handles, adapter)
            if (revoked := self._revocation(link.handshake, [attached])) is not None:
                raise revoked
            self._adapters[adapter] = attached
            return attached

    def begin(
        self, adapter: str | AttachedAdapter, layer: int, group: str, x: npt.NDArray[np.floating]
    ) -> PendingDelta:
        """Encrypt activations [T, d_in] for one group of one layer and send them. Never raises: `wait` does."""
        name = adapter if isinstance(adapter, str) else adapter.name
        with self._lock:
            link = self._link
            if link is None or not link.alive:
                return PendingDelta(self, None, None, ())
            try:
                if name not in self._adapters:
                    raise InvalidInputError("the adapter is not attached")
                shape = self._adapters[name].shape(layer, group)
                if x.ndim != 2 or x.shape[1] != shape.d_in or not len(x):
                    raise InvalidInputError(f"{group} of layer {layer} takes activations [T, {shape.d_in}]")
                return PendingDelta(self, link, shape, link.send(name, shape, x, self._options, self.stats))
            except InvalidInputError as error:
                # Also what encryption says of NaN and infinity: nothing was sent, the session is as before.
                self._log("delta refused", error, layer=layer, group=group)
            except Exception as error:
                self._break(link, error)
            return PendingDelta(self, None, None, ())

    def ensure_open(self) -> None:
        """Open the session again if it broke or its evidence is old; call between requests.

        Returns at once while the session is good. After a failed attempt the next one is made no earlier than
        the backoff allows (0.25 s, doubling to 8 s). Never holds up `begin` and `healthy` in other threads.
        Raises DeltaUnavailableError when there is no session.
        """
        with self._opening:
            with self._lock:
                link = self._link
                if self._closed:
                    raise DeltaUnavailableError(_NO_DELTA)
                if link is not None and link.alive and not self._replaceable(link):
                    return
            if time.monotonic() < self._retry_at:
                if link is not None and link.alive:
                    return
                raise DeltaUnavailableError(_NO_DELTA)
            try:
                fresh = self._connect(self._options.reconnect_seconds)
            except Exception as error:
                self._log("session not opened", error, retry_seconds=round(self._backoff, 2))
                self._retry_at = time.monotonic() + self._backoff
                self._backoff = min(2 * self._backoff, self._options.longest_backoff_seconds)
                if link is not None and link.alive:
                    return  # the old one still serves
                raise DeltaUnavailableError(_NO_DELTA) from None
            self._backoff = self._options.first_backoff_seconds
            with self._lock:
                # Meanwhile requests may have been sent or adapters attached on the old link; try again later.
                keep_old = link is not None and link.alive and not self._replaceable(link)
                complete = self._adapters.keys() <= fresh.handles.keys()
                revoked = self._revocation(fresh.handshake, self._adapters.values())  # meanwhile
                if complete and not keep_old and not self._closed and revoked is None:
                    self._link = fresh
            if self._link is not fresh:
                self._discard(fresh)
                if self._closed or revoked is not None:
                    raise DeltaUnavailableError(_NO_DELTA)
                return
            if link is not None:
                self._discard(link)
            log.info("session opened", endpoint=self.endpoint, evidence=fresh.handshake.peer.kind.value)

    def _replaceable(self, link: Link) -> bool:
        """Whether a living link's evidence is old and nothing is in flight on it."""
        return link.handshake.age_seconds > self._options.reattest_seconds and not link.stream.pending

    def revoke(self, notice: RevocationNotice) -> None:
        """End the session for good if this host, its coprocessor or an attached adapter was revoked.

        Waiting deltas fail. May be called from any thread.
        """
        with self._lock:
            self._revoked.add(notice)
            link = self._link
            revoked = None if link is None else self._revocation(link.handshake, self._adapters.values())
        if link is not None and revoked is not None:
            self._break(link, revoked)

    def close(self) -> None:
        """End the session and destroy its keys. Waiting deltas fail."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        if self._filler is not None:
            self._filler.close()
        if link is not None:
            self._discard(link)

    def __enter__(self) -> CoprocessorSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, connect_seconds: float) -> Link:
        handshake = HostHandshake.begin(
            self.endpoint,
            self._workload,
            self._parameters,
            connect_seconds,
            self._options.call_seconds,
            self._options.silence_seconds,
        )
        with self._lock:
            adapters, kind = dict(self._adapters), self._kind
            # Before it is sent a key; `ensure_open` looks again, for what is revoked while this goes on.
            revoked = self._revocation(handshake, adapters.values())
        keys: KeySchedule | None = None
        try:
            if revoked is not None:
                raise revoked
            if kind is not None and handshake.peer.kind is not kind:
                raise EvidenceRefusedError(
                    f"the coprocessor now has {handshake.peer.kind.value} evidence, not {kind.value}: restart "
                    "to accept it"
                )
            keys = KeySchedule(lambda: self._announce(handshake), self._options.tokens_per_key)
            handles: dict[str, int] = {}
            for name, known in adapters.items():
                again = self._attach(handshake, handles, name)
                if again.digest != known.digest:
                    raise PackageTamperedError(
                        f"the coprocessor now serves another release of {name}: restart to attach it"
                    )
            memory = handshake.share_memory(self._options.shared_memory_bytes)
        except BaseException:
            if keys is not None:
                keys.close()
            handshake.end()
            raise
        stream = EvaluationStream(handshake.channel, handshake.transcript.session_id, self._parameters, memory)
        link = Link(handshake, stream, keys, handles)
        stream.start(lambda cause: self._break(link, cause))
        return link

    def _revocation(self, handshake: HostHandshake, adapters: Iterable[AttachedAdapter]) -> RevokedError | None:
        """Why there must be no such session, if anything in it was revoked. Called under the lock."""
        own, peer = self._workload.identity.public.thumbprint, handshake.peer.identity.thumbprint
        for notice in self._revoked:
            if own in notice.workloads:
                return RevokedError("this inference host was revoked; ask whoever runs the attestor")
            if peer in notice.workloads:
                return RevokedError("the coprocessor was revoked; ask whoever runs the attestor")
            if any(item.name == notice.package_id and notice.sequence in (0, item.sequence) for item in adapters):
                return RevokedError("this adapter release was revoked by its owner")
        return None

    def _announce(self, handshake: HostHandshake) -> LinkKey:
        key = LinkKey(*handshake.announce_key(self._options.pool_bytes))
        if self._filler is not None:
            self._filler.add(key.host.pool)
        return key

    def _attach(self, handshake: HostHandshake, handles: dict[str, int], name: str) -> AttachedAdapter:
        handle, envelope, sealed = handshake.attach(name)
        attached = open_adapter(handshake, name, envelope, sealed, self._verify_keys)
        handles[name] = handle
        return attached

    def _finish(
        self, link: Link | None, shape: GroupShape | None, parts: Sequence[SentPart], timeout: float | None
    ) -> npt.NDArray[np.float64]:
        if link is None or shape is None:
            self.stats.add(failures=1)
            raise DeltaUnavailableError(_NO_DELTA)
        deadline = time.monotonic() + (self._options.reply_seconds if timeout is None else timeout)
        results = []
        try:
            for part in parts:
                started = time.perf_counter()
                response = part.reply.result(deadline - time.monotonic())
                received = time.perf_counter()
                if not isinstance(response, frames.EvaluationResponse):
                    raise _refusal(response)
                rows = EvaluatedRows(c1=response.c1, c0=response.c0)
                results.append(part.key.decrypt(part.encrypted, rows, shape.rows, shape.row_scales))
                self.stats.count(response.counts)
                self.stats.add(
                    wait_seconds=received - started,
                    decrypt_seconds=time.perf_counter() - received,
                    evaluate_seconds=response.evaluate_ns / 1e9,
                    bytes_down=frames.response_bytes(len(rows.c1), len(rows.c0), shape.rows, self._parameters),
                )
        except (DeltaUnavailableError, LeaseExpiredError, BudgetExhaustedError):
            self.stats.add(failures=1)
            raise
        except queue.Empty:
            self.stats.add(failures=1)
            self._break(link, UnavailableError("no response in time"))
            raise DeltaUnavailableError(_NO_DELTA) from None
        except Exception as error:
            # A response that does not fit: the key is destroyed and never used again.
            self.stats.add(failures=1)
            self._break(link, error)
            raise DeltaUnavailableError(_NO_DELTA) from None
        return results[0] if len(results) == 1 else np.concatenate(results)

    def _break(self, link: Link, cause: BaseException) -> None:
        """Destroy a link's keys and stream. Called by whoever first sees that something is wrong."""
        with self._lock:
            if not link.alive:
                return
            link.alive = False
        self._log("session broken", cause)
        self._discard(link)

    def _discard(self, link: Link) -> None:
        with self._lock:
            link.alive = False
            if link.discarded:
                return
            link.discarded = True
        link.destroy()

    def _log(self, event: str, cause: BaseException, **fields: object) -> None:
        reason = cause.reason if isinstance(cause, TenSafeError) else type(cause).__name__
        log.warning(event, endpoint=self.endpoint, reason=reason, frames=frames_of(cause), **fields)


def _refusal(answer: frames.EvaluationFailure | None) -> TenSafeError:
    """What an answer without a delta, or no answer, is to who waits for it."""
    code = frames.DELTA_UNAVAILABLE if answer is None else answer.code
    if code == frames.LEASE_EXPIRED:
        return LeaseExpiredError("the lease on this adapter is over")
    if code == frames.BUDGET_EXHAUSTED:
        return BudgetExhaustedError("the token budget of this adapter is spent")
    return DeltaUnavailableError(_NO_DELTA)


__all__ = ["AttachedAdapter", "CoprocessorSession", "PendingDelta", "SessionOptions"]
