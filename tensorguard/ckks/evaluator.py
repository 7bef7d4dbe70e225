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
from tensorguard.ckks.admission import Admission
from tensorguard.ckks.arrays import aligned, aligned_empty, scratch
from tensorguard.ckks.lanes import LANES
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.parallel import MAX_THREADS, split
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.pool import Pool, weakly
from tensorguard.ckks.products import GATHERED
from tensorguard.ckks.randomness import SecretStream, UniformExpander
from tensorguard.ckks.ring import Residues, ring
from tensorguard.ckks.weights import EncodedGroup
from tensorguard.errors import InvalidInputError


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
    sides. With ``threads`` > 1 a request is shared by so many threads; its answer is the same. The pool holds up
    to ``pool_bytes``.
    """

    def __init__(
        self,
        parameters: ParameterSet,
        pk0: Residues,
        pk1_seed: bytes,
        session_id: bytes,
        *,
        threads: int = 1,
        pool_bytes: int = 0,
    ) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise InvalidInputError(f"threads must be 1 to {MAX_THREADS}")
        self._admission = Admission(parameters, pk0, pk1_seed, session_id)
        self.parameters = parameters
        self._threads = threads
        self.counters = OperationCounters()
        self._ring = ring(parameters)
        self._expander = UniformExpander(parameters, session_id)
        self._lock = threading.Lock()
        pk1 = UniformExpander(parameters, session_id, public_key=True).expand([0], pk1_seed)[0]
        self._public_key = aligned(np.stack([self._ring.with_quotient(pk0), self._ring.with_quotient(pk1)]))
        self.pool = Pool("coprocessor", weakly(self._make_rerandomiser), 2 * pk1.nbytes, pool_bytes)
        """Encryptions of zero for `evaluate`. Fill it in idle time; without any, `evaluate` makes them itself."""

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
        self._admission.admit(group.d_in, plan, tokens, ids, seeds, b)
        return self._evaluate(group, weights, plan, tokens, ids, seeds, np.ascontiguousarray(b))

    def close(self) -> None:
        """Wipe the pool. Evaluations that run end as they would."""
        self.pool.close()

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
        constants, degree = self._ring, self.parameters.degree
        prime_count, responses = len(constants.primes), plan.downloads(tokens, group.rows)
        ready = self.pool.take(responses)
        in_line = responses - len(ready)
        trits, error_words, flood_words = self._randomness(in_line, tokens * group.rows)
        # The kernel overwrites each when it adds it: then it is in the cache anyway.
        addresses = np.array([element.values.ctypes.data for element in ready], np.uint64)
        flood = np.empty((tokens, group.rows, prime_count), np.uint32)
        kernels.flood(
            flood_words,
            flood.reshape(-1, prime_count),
            -self.parameters.flood_bits % 64,
            constants.constants,
            constants.flood_offset,
            constants.primes,
        )
        keys = self._expander.keys(ids.tolist(), seeds)
        if min(self._threads, responses) > 1:
            # Each thread needs all of a: it is expanded once, for all primes, instead of prime by prime.
            a = self._expander.expand_keys(keys, scratch.take("uniform", *b.shape), self._threads)
            keys = keys[:0]
        else:
            a = scratch.take("uniform", len(b), 1, degree)
        c1 = aligned_empty(responses, degree)
        c0 = np.empty((tokens, group.rows), np.uint32)

        def answer(first: int, end: int) -> None:
            made, count = min(end, in_line), end - first
            kernels.evaluate(
                (weights, b, a, keys),
                (
                    trits[first:made],
                    error_words[first:made],
                    addresses[max(first - in_line, 0) : max(end - in_line, 0)],
                    flood,
                ),
                plan.shape,
                plan.skip,
                first,
                c1[first:end],
                c0,
                (
                    scratch.take("inputs", plan.blocks(group.d_in), GATHERED),
                    scratch.take("expansion", 256),
                    scratch.take("sums", count, 2, degree),
                    scratch.take("transforms", 2, degree),
                    scratch.take("errors", count, kernels.error_values(degree)).view(np.int32),
                    scratch.take("all c1", count, prime_count, degree),
                    scratch.take("all c0", count, prime_count, -(-plan.tokens * plan.rows // LANES) * LANES),
                ),
                (constants.constants, constants.factors, constants.primes, constants.drops),
                self._public_key,
            )

        split(self._threads, responses, answer)
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
        degree, constants = self.parameters.degree, self._ring
        values = aligned_empty(len(constants.primes), 2, degree)
        kernels.encrypt_zero(
            values,
            trits[0],
            error_words[0],
            self._public_key,
            scratch.take("errors", kernels.error_values(degree)).view(np.int32),
            scratch.take("transforms", 2, degree),
            constants.factors,
            constants.primes,
        )
        return Rerandomiser(values)

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
            stream.words(responses, kernels.error_words(degree), kept_for="response errors"),
            stream.words(outputs, kernels.FLOOD_TERMS, limbs),
        )
