"""The inference host's side: one secret key, encryption of activations, decryption of responses."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import kernels
from tensorguard.ckks.checked import add_check_row, fits
from tensorguard.ckks.messages import EncryptedActivations, EvaluatedRows
from tensorguard.ckks.ntt import forward_all
from tensorguard.ckks.parameters import MANTISSA_BITS, ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.randomness import SEED_BYTES, SecretStream, UniformExpander
from tensorguard.ckks.ring import Residues, ring
from tensorguard.errors import InvalidInputError, UnavailableError

MAX_TOKENS = 1 << 16
_COUNTER_BITS = 48
_LARGEST_VALUE = 0.46
"""Of p0. Honest results stay below 0.45 by the choice of the scale, plus noise."""
_LONGEST_CALL_SECONDS = 10.0
"""How long `close` waits for running calls. Longer ones lose their key in between, and then their result."""

_KEY_GONE = "this session's key is gone (closed or forked); open a new session"


class HostSession:
    """One CKKS key pair and everything done with the secret half. The key is in this process's memory only.

    Several threads can encrypt and decrypt at the same time. `close` in one of them ends the calls of the
    others with UnavailableError: under a wiped key a ciphertext would be readable. In a forked child the key
    is gone.
    """

    def __init__(self, parameters: ParameterSet, pk1_seed: bytes, session_id: bytes, worker: int) -> None:
        if len(pk1_seed) != SEED_BYTES or not session_id:
            raise InvalidInputError("a session needs a 32-byte public-key seed and an identifier")
        if not 0 <= worker < 1 << (64 - _COUNTER_BITS):
            raise InvalidInputError("the worker number must fit 16 bits")
        self.parameters = parameters
        self._ring = ring(parameters)
        self._expander = UniformExpander(parameters, session_id)
        self._state = threading.Condition()
        """Guards what follows, and tells `close` that the last running call has ended."""
        self._running = 0
        self._next_id = (worker << _COUNTER_BITS) + 1
        self._last_id = (worker << _COUNTER_BITS) + (1 << _COUNTER_BITS) - 1
        self._closed = False
        self._keys = _make_key(parameters)
        _SESSIONS.add(self)
        public = UniformExpander(parameters, session_id, public_key=True).expand([0], pk1_seed)
        nothing = np.zeros((1, 1), np.int32)
        self.public_key: Residues = self._encrypt(nothing, Plan(1, 1, 1), self._ring.scale(1), public)[0]
        """pk0 = -pk1·s + e, uint32 [primes, N], transform domain, reduced."""
        self.public_key.flags.writeable = False

    @classmethod
    def create(cls, parameters: ParameterSet, pk1_seed: bytes, session_id: bytes, *, worker: int = 0) -> HostSession:
        """A session with a fresh key. ``pk1_seed`` (32 bytes) and ``session_id`` are public and agreed by
        both sides; ``worker`` (16 bits) keeps ciphertext identifiers of several workers with one key apart.
        """
        return cls(parameters, pk1_seed, session_id, worker)

    def __repr__(self) -> str:
        return "HostSession()"

    def __reduce__(self) -> str:
        raise TypeError("a HostSession holds a secret key and cannot be copied or pickled")

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Overwrite the key, after calls that are running; they and later ones raise UnavailableError."""
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: not self._running, _LONGEST_CALL_SECONDS)
        for key in self._keys:
            key.fill(0)

    def _forget_in_child(self) -> None:
        """`close` in a forked child. Only the forking thread exists here: what others held is never released."""
        self._state = threading.Condition()
        self._running = 0
        self.close()

    @contextmanager
    def _key_in_use(self) -> Iterator[tuple[Residues, Residues]]:
        """The keys, which stay whole while they are used. Raises UnavailableError, also at the end if the
        session was closed meanwhile: the result must not be used then.
        """
        with self._state:
            if self._closed:
                raise UnavailableError(_KEY_GONE)
            self._running += 1
        try:
            yield self._keys
        finally:
            lost = self._call_ended()
        if lost:
            raise UnavailableError(_KEY_GONE)

    def _call_ended(self) -> bool:
        """Whether the session was closed while the call ran."""
        with self._state:
            self._running -= 1
            self._state.notify_all()
            return self._closed

    def encrypt(
        self,
        x: npt.NDArray[np.float64] | npt.NDArray[np.float32],
        plan: Plan,
        norm_bound: float,
        *,
        checked: bool = False,
    ) -> EncryptedActivations:
        """Encrypt rows of activations [T, d_in] for a plan; ``norm_bound`` is the group's public weight
        bound.

        Each token is divided by its L2 norm, kept here (a zero token is sent as zero). ``checked`` adds a row
        that `decrypt` compares with the others. Raises InvalidInputError for an empty or non-finite input,
        UnavailableError if the key is gone.
        """
        if x.ndim != 2 or not (1 <= x.shape[0] <= MAX_TOKENS and x.shape[1] >= 1):
            raise InvalidInputError(f"activations must be [tokens, channels] with 1 to {MAX_TOKENS} tokens")
        plan.check(self.parameters)
        tokens, d_in = x.shape
        mantissas, norms = np.empty((tokens, d_in), np.int32), np.empty(tokens, np.float64)
        if not kernels.normalise(np.ascontiguousarray(x, np.float64), mantissas, norms):
            raise InvalidInputError("activations contain NaN or infinity; refusing to encrypt them")
        alpha = None
        if checked:
            mantissas, alpha = add_check_row(mantissas)
            tokens += 1
        scale = self.parameters.scale(norm_bound)
        count = plan.uploads(tokens, d_in)
        first = self._take_ids(count)
        seeds = os.urandom(SEED_BYTES * count)
        uniform = self._expander.expand(list(range(first, first + count)), seeds)
        return EncryptedActivations(
            plan=plan,
            tokens=tokens,
            ids=np.arange(first, first + count, dtype=np.uint64),
            seeds=seeds,
            b=self._encrypt(mantissas, plan, self._ring.scale(scale), uniform),
            norms=norms,
            unit=self.parameters.dropped / (scale << MANTISSA_BITS),
            alpha=alpha,
        )

    def _take_ids(self, count: int) -> int:
        with self._state:
            if self._closed:
                raise UnavailableError(_KEY_GONE)
            first = self._next_id
            if first + count - 1 > self._last_id:
                raise UnavailableError("this key has used all its ciphertext identifiers; open a new session")
            self._next_id += count
        return first

    def _encrypt(self, mantissas: npt.NDArray[np.int32], plan: Plan, scale: Residues, uniform: Residues) -> Residues:
        b = np.empty_like(uniform)
        degree = self.parameters.degree
        words = kernels.error_words(degree)
        with self._key_in_use() as (encryption_key, _):
            kernels.encrypt(
                mantissas,
                plan.shape,
                scale,
                SecretStream("encryption error").words(len(uniform), words),
                uniform,
                encryption_key,
                b,
                np.empty(degree, np.uint32),
                np.empty((2, 3 * words // 2), np.int32),
                self._ring.factors,
                self._ring.primes,
            )
        return b

    def decrypt(
        self,
        encrypted: EncryptedActivations,
        response: EvaluatedRows,
        rows: int,
        row_scales: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float64]:
        """z float64 [T, rows]: the response's integers times ``row_scales`` [rows] and each token's norm.

        Raises InvalidInputError if the response is malformed, out of range or (checked mode) does not fit its
        check row, which is not part of the result: destroy the session then.
        """
        plan, tokens = encrypted.plan, encrypted.tokens
        c1, c0 = response.c1, response.c0
        prime = self._ring.primes[0]
        if (
            c1.dtype != np.uint32
            or c0.dtype != np.uint32
            or c1.shape != (plan.downloads(tokens, rows), self.parameters.degree)
            or c0.shape != (tokens, rows)
            or row_scales.shape != (rows,)
            or c1.max() >= prime
            or c0.max() >= prime
        ):
            raise InvalidInputError("the response does not fit its request")
        values = np.empty((tokens, rows), np.int32)
        scratch, transformed = np.empty((2, self.parameters.degree), np.uint32)
        with self._key_in_use() as (_, decryption_key):
            kernels.decrypt(
                np.ascontiguousarray(c1),
                np.ascontiguousarray(c0),
                plan.shape,
                plan.skip,
                decryption_key,
                values,
                scratch,
                transformed,
                self._ring.factors[0],
                prime,
            )
        if np.abs(values).max() > _LARGEST_VALUE * float(prime):
            raise InvalidInputError("the response does not fit its request")
        if encrypted.alpha is not None:
            if not fits(values, encrypted.alpha, self.parameters):
                raise InvalidInputError("the response does not fit its request")
            values = values[:-1]
        z = values * (encrypted.unit * row_scales)
        z *= encrypted.norms[:, None]
        return z


def _make_key(parameters: ParameterSet) -> tuple[Residues, Residues]:
    """(-s for encryption [primes, 2, N], s for decryption modulo p0 [2, N]), transform domain, with Shoup
    quotients.
    """
    constants = ring(parameters)
    primes = constants.primes[:, None]
    trits = SecretStream("secret key").ternary(1, parameters.degree).astype(np.uint32)
    secret, negated = np.empty((2, 1, len(primes), parameters.degree), np.uint32)
    forward_all(trits[:, None, :] + (primes - np.uint32(1)), secret, constants.factors, constants.primes)
    forward_all(primes + np.uint32(1) - trits[:, None, :], negated, constants.factors, constants.primes)
    return constants.with_quotient(negated[0]), constants.with_quotient(secret[0])[0].copy()


_SESSIONS: weakref.WeakSet[HostSession] = weakref.WeakSet()


def _forget_keys() -> None:
    for session in list(_SESSIONS):
        session._forget_in_child()


os.register_at_fork(after_in_child=_forget_keys)
