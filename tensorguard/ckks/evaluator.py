"""The coprocessor's side: evaluates a group on ciphertexts, re-randomises, switches the modulus. Holds no
secret key.

Only pointwise products and additions happen on ciphertexts: there is no rotation, relinearisation or key
switching, and no key for one could be given to it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks import kernels
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.pool import Pool, weakly
from tensorguard.ckks.randomness import SEED_BYTES, SecretStream, UniformExpander
from tensorguard.ckks.ring import Residues, ring
from tensorguard.ckks.weights import EncodedGroup
from tensorguard.errors import InvalidInputError

MAX_CIPHERTEXTS = 1 << 12
_COUNTER_BITS = 48


@dataclass(slots=True)
class OperationCounters:
    """Operations since the evaluator was made. Transforms are per prime; products, additions per polynomial
    pair. What filling the pool took is not in them.
    """

    transforms: int = 0
    products: int = 0
    additions: int = 0
    rerandomisations: int = 0
    modulus_switches: int = 0

    @property
    def rotations(self) -> int:
        """Always 0: the evaluator has no such operation."""
        return 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rerandomiser:
    """One response's encryption of zero: (pk0·u, pk1·u + e1), uint32 [primes, 2, N], transform domain, below 2p."""

    values: Residues

    def wipe(self) -> None:
        """Overwrite it: whoever has it and the response can divide the weights out."""
        self.values.fill(0)


class Evaluator:
    """Evaluates requests of one host key.

    pk0 uint32 [primes, N] reduced, transform domain; pk1_seed 32 bytes, session_id: public, agreed by both
    sides. The pool holds up to ``pool_bytes``.
    """

    def __init__(
        self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes, *, pool_bytes: int = 0
    ) -> None:
        if len(pk1_seed) != SEED_BYTES or not session_id:
            raise InvalidInputError("a session needs a 32-byte public-key seed and an identifier")
        self.parameters = parameters
        self.counters = OperationCounters()
        self._ring = ring(parameters)
        self._expander = UniformExpander(parameters, session_id)
        self._lock = threading.Lock()
        self._last_ids: dict[int, int] = {}
        self._check_residues(pk0[None], 1)
        pk1 = UniformExpander(parameters, session_id, public_key=True).expand([0], pk1_seed)[0]
        self._public_key = np.stack([self._ring.with_quotient(pk0), self._ring.with_quotient(pk1)])
        self.pool = Pool("coprocessor", weakly(self._make_rerandomiser), 2 * pk1.nbytes, pool_bytes)
        """Encryptions of zero for `evaluate`. Fill it in idle time; without any, `evaluate` makes them itself."""

    def _check_residues(self, polynomials: Residues, count: int) -> None:
        shape = (count, len(self.parameters.primes), self.parameters.degree)
        if polynomials.dtype != np.uint32 or polynomials.shape != shape:
            raise InvalidInputError(f"expected {count} polynomials of uint32 residues {list(shape[1:])}")
        if not kernels.all_reduced(np.ascontiguousarray(polynomials), self._ring.primes):
            raise InvalidInputError("a residue is not below its prime")

    def _take_ids(self, ids: npt.NDArray[np.uint64]) -> None:
        """Refuse identifiers that do not grow per worker (its number is in the high 16 bits); remember the
        last.
        """
        values = ids.tolist()
        with self._lock:
            last = dict(self._last_ids)
            for value in values:
                worker = value >> _COUNTER_BITS
                if value <= last.get(worker, 0):
                    raise InvalidInputError("a ciphertext identifier was used before")
                last[worker] = value
            self._last_ids = last

    def evaluate(
        self,
        group: EncodedGroup,
        plan: Plan,
        tokens: int,
        ids: npt.NDArray[np.uint64],
        seeds: bytes,
        b: Residues,
    ) -> EvaluatedRows:
        """W·x for every token, re-randomised, flooded, modulo p0.

        ids uint64 [C], seeds 32·C bytes, b uint32 [C, primes, N], C = plan.uploads(tokens, d_in). Raises
        InvalidInputError for malformed input, unreduced residues or repeated identifiers and NotFoundError
        for a plan that was not compiled into the group.
        """
        if group.parameters != self.parameters:
            raise InvalidInputError("the adapter was prepared for another parameter set")
        weights = group.encoded(plan)
        count = plan.uploads(tokens, group.d_in) if tokens >= 1 else 0
        if not 1 <= count <= MAX_CIPHERTEXTS:
            raise InvalidInputError(f"a request has 1 to {MAX_CIPHERTEXTS} ciphertexts")
        if ids.dtype != np.uint64 or ids.shape != (count,) or len(seeds) != SEED_BYTES * count:
            raise InvalidInputError(f"expected {count} ciphertext identifiers and seeds")
        self._check_residues(b, count)
        self._take_ids(ids)
        return self._evaluate(group, weights, plan, tokens, ids, seeds, np.ascontiguousarray(b))

    def _evaluate(
        self,
        group: EncodedGroup,
        weights: Residues,
        plan: Plan,
        tokens: int,
        ids: npt.NDArray[np.uint64],
        seeds: bytes,
        b: Residues,
    ) -> EvaluatedRows:
        constants = self._ring
        prime_count, degree = len(constants.primes), self.parameters.degree
        responses = plan.downloads(tokens, group.rows)
        a = self._expander.expand(ids.tolist(), seeds)
        sums = np.empty((responses, prime_count, 2, degree), np.uint32)
        kernels.accumulate(weights, b, a, plan.chunks(tokens), sums, constants.constants)
        ready = self.pool.take(responses)
        in_line = responses - len(ready)
        trits, error_words, flood_words = self._randomness(in_line, tokens * group.rows)
        work = np.empty((prime_count, degree), np.uint32)
        kernels.add_encryption_of_zero(
            sums[:in_line], trits, self._public_key, work[0], work[1], constants.factors, constants.primes
        )
        for rerandomiser, total in zip(ready, sums[in_line:], strict=True):
            kernels.add_lazily(total, rerandomiser.values, constants.primes)
            rerandomiser.wipe()
        mask = np.empty((tokens * group.rows, prime_count), np.uint32)
        kernels.flood(
            flood_words,
            mask,
            -self.parameters.flood_bits % 64,
            constants.constants,
            constants.flood_offset,
            constants.primes,
        )
        c1 = np.empty((responses, degree), np.uint32)
        c0 = np.empty((tokens, group.rows), np.uint32)
        kernels.finish(
            sums,
            error_words,
            mask.reshape(tokens, group.rows, prime_count),
            plan.shape,
            plan.skip,
            c1,
            c0,
            work,
            np.empty((prime_count, plan.tokens * plan.rows), np.uint32),
            np.empty(3 * kernels.error_words(degree) // 2, np.int32),
            constants.factors,
            constants.primes,
            constants.drops,
        )
        with self._lock:
            self.counters.transforms += prime_count * (2 * responses + in_line)
            self.counters.products += plan.chunks(tokens) * plan.polynomials(group.d_in, group.rows)
            self.counters.additions += plan.chunks(tokens) * plan.polynomials(group.d_in, group.rows) + responses
            self.counters.rerandomisations += responses
            self.counters.modulus_switches += responses
        return EvaluatedRows(c1=c1, c0=c0)

    def _make_rerandomiser(self) -> Rerandomiser:
        """For the pool."""
        trits, error_words, _ = self._randomness(1, 0)
        degree = self.parameters.degree
        values = np.zeros((1, len(self._ring.primes), 2, degree), np.uint32)
        work = np.empty((2, degree), np.uint32)
        constants = self._ring
        kernels.add_encryption_of_zero(
            values, trits, self._public_key, work[0], work[1], constants.factors, constants.primes
        )
        kernels.add_error(
            values,
            error_words,
            work[0],
            work[1],
            np.empty(3 * kernels.error_words(degree) // 2, np.int32),
            constants.factors,
            constants.primes,
        )
        return Rerandomiser(values[0])

    def _randomness(
        self, responses: int, outputs: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """u + 1 uint8 [responses, N], words for e1 [responses, error_words], words for f [outputs, 4, limbs]: fresh
        per call.
        """
        stream = SecretStream("re-randomisation")
        degree, limbs = self.parameters.degree, kernels.flood_limbs(self.parameters.flood_bits)
        return (
            stream.ternary(responses, degree),
            stream.words(responses, kernels.error_words(degree)),
            stream.words(outputs, kernels.FLOOD_TERMS, limbs),
        )
