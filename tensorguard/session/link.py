"""One living connection of a session: handshake, stream, CKKS keys and handles, which all die together."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.host import HostSession
from tensorguard.ckks.messages import EncryptedActivations
from tensorguard.ckks.planner import select_plan
from tensorguard.errors import InvalidInputError
from tensorguard.session import frames
from tensorguard.session.adapter import GroupShape
from tensorguard.session.handshake import HostHandshake
from tensorguard.session.keys import KeySchedule, LinkKey
from tensorguard.session.options import SessionOptions
from tensorguard.session.shared_memory import Slot
from tensorguard.session.stats import SessionStats
from tensorguard.session.stream import EvaluationStream, Reply


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
    keys: KeySchedule
    handles: dict[str, int]
    alive: bool = True
    discarded: bool = False

    @property
    def key(self) -> LinkKey:
        """The current key."""
        return self.keys.current

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
        parameters = self.handshake.parameters
        spare = int(options.checked)  # rows that a frame has beside those of x
        plan = select_plan(shape.plans, parameters, len(x) + spare, shape.d_in, shape.rows)
        chunk_bytes = plan.chunk_bytes(parameters, shape.d_in, shape.rows)
        step = max(1, max(1, options.frame_bytes // chunk_bytes) * plan.tokens - spare)
        key = self.keys.key_for((adapter, shape.layer, shape.group), len(x) + spare * -(-len(x) // step))
        if len(x) > step and not np.isfinite(x).all():
            raise InvalidInputError("activations contain NaN or infinity")
        parts, sent, seconds, pooled, count = [], self.stream.bytes_sent, 0.0, 0, 0
        for start in range(0, len(x), step):
            rows = x[start : start + step]
            started = time.perf_counter()
            if len(rows) < step:
                plan = select_plan(shape.plans, parameters, len(rows) + spare, shape.d_in, shape.rows)
            encrypted = key.host.encrypt(rows, plan, shape.norm_bound, checked=options.checked)
            seconds += time.perf_counter() - started
            pooled, count = pooled + encrypted.pooled, count + len(encrypted.ids)
            parts.append(SentPart(encrypted, key.host, self._submit(adapter, shape, key, encrypted)))
        stats.add(calls=1, tokens=len(x), encrypt_seconds=seconds, bytes_up=self.stream.bytes_sent - sent)
        stats.add(ciphertexts_pooled=pooled, ciphertexts_in_line=count - pooled)
        return parts

    def destroy(self) -> None:
        """Wipe the keys, end the stream, and tell the coprocessor as far as it still listens."""
        self.keys.close()
        self.stream.close()
        # Telling may take a moment, and the stream's reader may be the caller.
        threading.Thread(target=self.handshake.end, name="he-lora-close", daemon=True).start()

    def _submit(self, adapter: str, shape: GroupShape, key: LinkKey, encrypted: EncryptedActivations) -> Reply:
        def build(request_id: int, slot: Slot | None) -> bytes:
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
                    slot=slot,
                )
            )

        parameters = self.handshake.parameters
        responses = encrypted.plan.downloads(encrypted.tokens, shape.rows)
        return self.stream.submit(
            build,
            max(
                frames.request_bytes(len(encrypted.ids), parameters),
                frames.response_bytes(responses, encrypted.tokens, shape.rows, parameters),
            ),
        )
