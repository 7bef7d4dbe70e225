"""The inference host's side: one secret key, encryption of activations, decryption of responses."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import kernels
from tensorguard.ckks.arrays import aligned, aligned_empty, scratch
from tensorguard.ckks.checked import add_check_row, fits
from tensorguard.ckks.messages import EncryptedActivations, EvaluatedRows
from tensorguard.ckks.ntt import forward_all
from tensorguard.ckks.parameters import MANTISSA_BITS, ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.pool import Pool, weakly
from tensorguard.ckks.randomness import SEED_BYTES, SecretStream, UniformExpander
from tensorguard.ckks.ring import Residues, ring
from tensorguard.errors import InvalidInputError, UnavailableError

MAX_TOKENS = 1 << 16
_COUNTER_BITS = 48
_WORKER_BITS = 15
_POOLED = 1 << _WORKER_BITS
"""Lane of identifiers of a worker's pooled ciphertexts. They get theirs when they are made, and must still grow."""
_LARGEST_VALUE = 0.46
"""Of p0. Honest results stay below 0.45 by the choice of the scale, plus noise."""
_LONGEST_CALL_SECONDS = 10.0
"""How long `close` waits for running calls. Longer ones lose their key in between, and then their result."""

_KEY_GONE = "this session's key is gone (closed or forked); open a new session"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EncryptionOfZero:
    """A ciphertext without its message: identifier, seed (32 bytes) and b = -a·s + NTT(e), uint32 [primes, N]."""

    identifier: int
    seed: bytes
    b: Residues

    def wipe(self) -> None:
        """Overwrite b: with it a message could be read from the ciphertext that was sent."""
        self.b.fill(0)


class _Identifiers:
    """Ciphertext identifiers of one lane, which only grow."""

    def __init__(self, lane: int) -> None:
        self.next = (lane << _COUNTER_BITS) + 1
        self.last = (lane << _COUNTER_BITS) + (1 << _COUNTER_BITS) - 1

    def take(self, count: int) -> int:
        """The first of ``count``. Raises UnavailableError when they are used up."""
        first = self.next
        if first + count - 1 > self.last:
            raise UnavailableError("this key has used all its ciphertext identifiers; open a new session")
        self.next += count
        return first


class HostSession:
    """One CKKS key pair and everything done with the secret half. The key is in this process's memory only.

    Several threads can encrypt and decrypt at the same time. `close` in one of them ends the calls of the
    others with UnavailableError: under a wiped key a ciphertext would be readable. In a forked child the key
    is gone.
    """

    def __init__(
        self, parameters: ParameterSet, pk1_seed: bytes, session_id: bytes, worker: int, pool_bytes: int
    ) -> None:
        if len(pk1_seed) != SEED_BYTES or not session_id:
            raise InvalidInputError("a session needs a 32-byte public-key seed and an identifier")
        if not 0 <= worker < 1 << _WORKER_BITS:
            raise InvalidInputError(f"the worker number must fit {_WORKER_BITS} bits")
        self.parameters = parameters
        self._ring = ring(parameters)
        self._expander = UniformExpander(parameters, session_id)
        self._state = threading.Condition()
        """Guards what follows, and tells `close` that the last running call has ended."""
        self._running = 0
        self._in_line, self._pooled = _Identifiers(worker), _Identifiers(worker | _POOLED)
        self._closed = False
        self._keys = _make_key(parameters)
        _SESSIONS.add(self)
        public = UniformExpander(parameters, session_id, public_key=True).expand([0], pk1_seed)
        self.public_key: Residues = self._encrypt_zero(public)
        """pk0 = -pk1·s + e, uint32 [primes, N], transform domain, reduced."""
        self.public_key.flags.writeable = False
        self.pool = Pool("host", weakly(self._make_zero), self.public_key.nbytes, pool_bytes)
        """Encryptions of zero for `encrypt`. Fill it in idle time; without any, `encrypt` makes them itself."""

    @classmethod
    def create(
        cls, parameters: ParameterSet, pk1_seed: bytes, session_id: bytes, *, worker: int = 0, pool_bytes: int = 0
    ) -> HostSession:
        """A session with a fresh key. ``pk1_seed`` (32 bytes) and ``session_id`` are public and agreed by
        both sides; ``worker`` (15 bits) keeps ciphertext identifiers of several workers with one key apart;
        the pool holds up to ``pool_bytes``.
        """
        return cls(parameters, pk1_seed, session_id, worker, pool_bytes)

    def __repr__(self) -> str:
        return "HostSession()"

    def __reduce__(self) -> str:
        raise TypeError("a HostSession holds a secret key and cannot be copied or pickled")

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Overwrite the key and the pool, after calls that are running; they and later ones raise UnavailableError."""
        self._wipe()
        self.pool.close()

    def _wipe(self) -> None:
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: not self._running, _LONGEST_CALL_SECONDS)
        for key in self._keys:
            key.fill(0)

    def _forget_in_child(self) -> None:
        """`close` in a forked child. Only the forking thread exists here: what others held is never released.

        The pool forgets by itself.
        """
        self._state = threading.Condition()
        self._running = 0
        self._wipe()

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
        if self._closed:
            raise UnavailableError(_KEY_GONE)
        zeros = self.pool.take(count)
        try:
            ids, seeds, b = self._encrypt(mantissas, plan, self._ring.scale(scale), count, zeros)
        finally:
            for zero in zeros:
                zero.wipe()
        return EncryptedActivations(
            plan=plan,
            tokens=tokens,
            ids=np.array(ids, np.uint64),
            seeds=seeds,
            b=b,
            norms=norms,
            unit=self.parameters.dropped / (scale << MANTISSA_BITS),
            pooled=len(zeros),
            alpha=alpha,
        )

    def _encrypt(
        self,
        mantissas: npt.NDArray[np.int32],
        plan: Plan,
        scale: Residues,
        count: int,
        zeros: list[EncryptionOfZero],
    ) -> tuple[list[int], bytes, Residues]:
        """Identifiers, seeds and b of ``count`` ciphertexts: first those made in line, then those of ``zeros``."""
        in_line = count - len(zeros)
        ids, seeds, uniform = self._expand_new(self._in_line, in_line)
        b = aligned_empty(count, *uniform.shape[1:])
        for zero, target in zip(zeros, b[in_line:], strict=True):
            target[...] = zero.b
        with self._key_in_use() as (key, _):
            if in_line:
                self._encrypt_in_line(key, mantissas, plan, scale, uniform, b[:in_line])
            if zeros:
                work, signed = self._scratch(2)
                kernels.add_messages(
                    mantissas,
                    plan.shape,
                    scale,
                    in_line,
                    b[in_line:],
                    work,
                    signed,
                    self._ring.factors,
                    self._ring.primes,
                )
                signed.fill(0)
        return ids + [zero.identifier for zero in zeros], seeds + b"".join(zero.seed for zero in zeros), b

    def _expand_new(self, identifiers: _Identifiers, count: int) -> tuple[list[int], bytes, Residues]:
        """``count`` new identifiers, their seeds, and a uint32 [count, primes, N], valid until the next call in
        this thread."""
        with self._state:
            if self._closed:
                raise UnavailableError(_KEY_GONE)
            first = identifiers.take(count)
        ids, seeds = list(range(first, first + count)), os.urandom(SEED_BYTES * count)
        shape = (count, len(self.parameters.primes), self.parameters.degree)
        return ids, seeds, self._expander.expand(ids, seeds, scratch.take("uniform", *shape))

    def _encrypt_in_line(
        self,
        key: Residues,
        mantissas: npt.NDArray[np.int32],
        plan: Plan,
        scale: Residues,
        uniform: Residues,
        b: Residues,
    ) -> None:
        """Fill b of the first len(b) ciphertexts, with errors of their own."""
        work, signed = self._scratch(1)
        words = SecretStream("encryption error").words(
            len(b), kernels.error_words(self.parameters.degree), kept_for="encryption errors"
        )
        kernels.encrypt(
            mantissas,
            plan.shape,
            scale,
            words,
            uniform,
            key,
            b,
            0,
            work[0],
            signed,
            self._ring.factors,
            self._ring.primes,
        )
        # With its error a ciphertext tells the key, which may be destroyed long before this thread encrypts again.
        for array in (words, signed, work):
            array.fill(0)

    def _scratch(self, rows: int) -> tuple[Residues, npt.NDArray[np.int32]]:
        """uint32 [rows, N] and int32 [2, space for N errors]."""
        degree = self.parameters.degree
        signed = scratch.take("signed", 2, kernels.error_values(degree)).view(np.int32)
        return scratch.take("plaintext", rows, degree), signed

    def _encrypt_zero(self, uniform: Residues) -> Residues:
        """-a·s + NTT(e), uint32 [primes, N], for a uint32 [1, primes, N]."""
        b = aligned_empty(*uniform.shape)
        nothing = np.zeros((1, 1), np.int32)
        with self._key_in_use() as (key, _):
            self._encrypt_in_line(key, nothing, Plan(1, 1, 1), self._ring.scale(1), uniform, b)
        result: Residues = b[0]
        return result

    def _make_zero(self) -> EncryptionOfZero:
        """For the pool, which asks for one at a time. Raises UnavailableError if the key is gone."""
        ids, seed, uniform = self._expand_new(self._pooled, 1)
        return EncryptionOfZero(ids[0], seed, self._encrypt_zero(uniform))

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
        coefficients, transformed = scratch.take("decryption", 2, self.parameters.degree)
        with self._key_in_use() as (_, decryption_key):
            kernels.decrypt(
                np.ascontiguousarray(c1),
                np.ascontiguousarray(c0),
                plan.shape,
                plan.skip,
                decryption_key,
                values,
                coefficients,
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
    return constants.with_quotient(negated[0]), aligned(constants.with_quotient(secret[0])[0].copy())


_SESSIONS: weakref.WeakSet[HostSession] = weakref.WeakSet()


def _forget_keys() -> None:
    for session in list(_SESSIONS):
        session._forget_in_child()


os.register_at_fork(after_in_child=_forget_keys)
