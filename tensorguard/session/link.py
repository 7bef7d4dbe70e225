"""One living connection of a session: handshake, stream, CKKS keys and handles, which all die together."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.host import HostSession
from tensorguard.ckks.messages import EncryptedActivations
from tensorguard.ckks.planner import select_plan
from tensorguard.errors import InvalidInputError
from tensorguard.session import frames
from tensorguard.session.adapter import GroupShape
from tensorguard.session.handshake import HostHandshake
from tensorguard.session.options import SessionOptions
from tensorguard.session.stats import SessionStats
from tensorguard.session.stream import EvaluationStream, Reply


@dataclass(slots=True, eq=False)
class LinkKey:
    """A CKKS key and the rows that passed through each (adapter, layer, group) under it."""

    number: int
    host: HostSession
    used: Counter[tuple[str, int, str]] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class SentPart:
    """One frame on its way, with what reads its answer."""

    encrypted: EncryptedActivations
    key: HostSession
    reply: Reply


@dataclass(slots=True, eq=False)
class Link:
    """Used under the session's lock, except for reading replies."""

    handshake: HostHandshake
    stream: EvaluationStream
    keys: list[LinkKey]
    """The current key last, before it the previous one: requests under it may be in flight."""
    handles: dict[str, int]
    alive: bool = True
    discarded: bool = False

    @property
    def key(self) -> LinkKey:
        """The current key."""
        return self.keys[-1]

    def send(
        self,
        adapter: str,
        shape: GroupShape,
        x: npt.NDArray[np.floating],
        options: SessionOptions,
        stats: SessionStats,
    ) -> list[SentPart]:
        """Encrypt activations [T, d_in] and send them, in several frames if they are many.

        Raises InvalidInputError for activations that are not finite (nothing was sent), UnavailableError.
        """
        key = self._key_for(adapter, shape, len(x), options.tokens_per_key)
        parameters = self.handshake.parameters
        plan = select_plan(shape.plans, parameters, len(x), shape.d_in, shape.rows)
        chunk_bytes = plan.chunk_bytes(parameters, shape.d_in, shape.rows)
        step = max(1, options.frame_bytes // chunk_bytes) * plan.tokens
        if len(x) > step and not np.isfinite(x).all():
            raise InvalidInputError("activations contain NaN or infinity")
        parts, sent, seconds = [], self.stream.bytes_sent, 0.0
        for start in range(0, len(x), step):
            rows = x[start : start + step]
            started = time.perf_counter()
            if len(rows) < step:
                plan = select_plan(shape.plans, parameters, len(rows), shape.d_in, shape.rows)
            encrypted = key.host.encrypt(rows, plan, shape.norm_bound)
            seconds += time.perf_counter() - started
            parts.append(SentPart(encrypted, key.host, self._submit(adapter, shape, key, encrypted)))
        stats.add(calls=1, tokens=len(x), encrypt_seconds=seconds, bytes_up=self.stream.bytes_sent - sent)
        return parts

    def destroy(self) -> None:
        """Wipe the keys, end the stream, and tell the coprocessor as far as it still listens."""
        for key in self.keys:
            key.host.close()
        self.stream.close()
        # Telling may take a moment, and the stream's reader may be the caller.
        threading.Thread(target=self.handshake.end, name="he-lora-close", daemon=True).start()

    def _submit(self, adapter: str, shape: GroupShape, key: LinkKey, encrypted: EncryptedActivations) -> Reply:
        def build(request_id: int) -> bytes:
            return frames.write_request(
                frames.EvaluationRequest(
                    request_id=request_id,
                    adapter_handle=self.handles[adapter],
                    layer=shape.layer,
                    group=shape.group,
                    plan=encrypted.plan,
                    tokens=encrypted.tokens,
                    key_number=key.number,
                    ids=encrypted.ids,
                    seeds=encrypted.seeds,
                    b=encrypted.b,
                )
            )

        return self.stream.submit(build)

    def _key_for(self, adapter: str, shape: GroupShape, tokens: int, tokens_per_key: int) -> LinkKey:
        """The current key, after replacing it when these tokens would exceed its bound."""
        group = (adapter, shape.layer, shape.group)
        if self.key.used[group] and self.key.used[group] + tokens > tokens_per_key:
            fresh = LinkKey(*self.handshake.announce_key())
            for old in self.keys[:-1]:
                old.host.close()
            self.keys = [self.key, fresh]
        self.key.used[group] += tokens
        return self.key
