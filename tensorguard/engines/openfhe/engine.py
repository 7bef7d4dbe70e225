"""Products, encryptions of zero and modulus switches by OpenFHE, in the sessions and frames of our protocol."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.admission import Admission
from tensorguard.ckks.evaluator import OperationCounters
from tensorguard.ckks.messages import EvaluatedRows
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.plan import Plan
from tensorguard.ckks.randomness import SEED_BYTES, UniformExpander
from tensorguard.ckks.ring import Residues
from tensorguard.ckks.weights import GroupWeights
from tensorguard.engines.openfhe import flood
from tensorguard.engines.openfhe.context import EXCLUSIVE, Ciphertext, Context, Plaintext, shared_context
from tensorguard.engines.openfhe.library import Library, load_library
from tensorguard.errors import InvalidInputError, NotFoundError, UnavailableError


class OpenFheGroup:
    """A group's weights as OpenFHE plaintexts, for every plan it may be evaluated with."""

    def __init__(self, context: Context, weights: GroupWeights, plans: Iterable[Plan]) -> None:
        self.plans = frozenset(plans)
        for plan in self.plans:
            plan.check(context.parameters)
        self.rows, self.d_in = weights.rows, weights.d_in
        self.parameters = context.parameters
        with EXCLUSIVE:
            self._encoded = {plan: _encode(context, weights.integers, plan) for plan in sorted(self.plans)}

    def __repr__(self) -> str:
        plans = sorted(plan.identifier for plan in self.plans)
        return f"OpenFheGroup(rows={self.rows}, d_in={self.d_in}, plans={plans})"

    @property
    def nbytes(self) -> int:
        """Bytes of plaintexts held by OpenFHE: 64-bit residues, and the complex slots, which it keeps."""
        polynomial = self.parameters.degree * (8 * len(self.parameters.primes) + 8)
        return polynomial * sum(plan.polynomials(self.d_in, self.rows) for plan in self.plans)

    def encoded(self, plan: Plan) -> Sequence[Sequence[Plaintext]]:
        """[row groups][blocks]. Raises NotFoundError for a plan that was not compiled."""
        try:
            return self._encoded[plan]
        except KeyError:
            raise NotFoundError(f"plan {plan.identifier} is not one this adapter was packaged with") from None


def _encode(context: Context, integers: npt.NDArray[np.int32], plan: Plan) -> list[list[Plaintext]]:
    rows, d_in = integers.shape
    encoded = []
    for first_row in range(0, rows, plan.rows):
        blocks = []
        for first_channel in range(0, d_in, plan.channels):
            part = integers[first_row : first_row + plan.rows, first_channel : first_channel + plan.channels]
            polynomial = np.zeros(context.parameters.degree)
            places = polynomial[: plan.tokens * plan.channels * plan.rows].reshape(
                plan.rows, plan.channels, plan.tokens
            )
            places[: part.shape[0], plan.channels - part.shape[1] :, 0] = part[:, ::-1]
            blocks.append(context.plaintext(polynomial))
        encoded.append(blocks)
    return encoded


class OpenFheEvaluator:
    """Evaluates requests of one host key."""

    def __init__(self, context: Context, pk0: Residues, pk1_seed: bytes, session_id: bytes) -> None:
        self._admission = Admission(context.parameters, pk0, pk1_seed, session_id)
        self.parameters = context.parameters
        self.counters = OperationCounters()
        self._context = context
        self._expander = UniformExpander(context.parameters, session_id)
        self._lock = threading.Lock()
        self._process = os.getpid()
        pk1 = UniformExpander(context.parameters, session_id, public_key=True).expand([0], pk1_seed)[0]
        with EXCLUSIVE:
            self._public_key = context.public_key(pk0, pk1)
            # Of a product's degree, so that OpenFHE adds encryptions of it to products as they are.
            self._nothing = context.plaintext(np.zeros(context.parameters.degree), 2)

    def evaluate(
        self,
        group: OpenFheGroup,
        plan: Plan,
        tokens: int,
        ids: npt.NDArray[np.uint64],
        seeds: bytes,
        b: Residues,
    ) -> EvaluatedRows:
        """As `RequestEvaluator.evaluate`. Raises UnavailableError in a forked child, where OpenFHE's generator would
        repeat what it gives the parent.
        """
        if os.getpid() != self._process:
            raise UnavailableError("this process was forked: OpenFHE's randomness would repeat; open a new session")
        if group.parameters != self.parameters:
            raise InvalidInputError("the adapter was prepared for another parameter set")
        weights = group.encoded(plan)
        self._admission.admit(group.d_in, plan, tokens, ids, seeds, b)
        with EXCLUSIVE:
            return self._evaluate(group, weights, plan, tokens, ids, seeds, b)

    def close(self) -> None:
        """Nothing is made ahead."""

    def _evaluate(
        self,
        group: OpenFheGroup,
        weights: Sequence[Sequence[Plaintext]],
        plan: Plan,
        tokens: int,
        ids: npt.NDArray[np.uint64],
        seeds: bytes,
        b: Residues,
    ) -> EvaluatedRows:
        responses = plan.downloads(tokens, group.rows)
        c1 = np.empty((responses, self.parameters.degree), np.uint32)
        c0 = np.empty((tokens, group.rows), np.uint32)
        blocks = plan.blocks(group.d_in)
        for chunk in range(plan.chunks(tokens)):
            inputs = self._inputs(ids, seeds, b, range(chunk * blocks, (chunk + 1) * blocks))
            first_token = chunk * plan.tokens
            for index, row_of_weights in enumerate(weights):
                first_row = index * plan.rows
                part = c0[first_token : first_token + plan.tokens, first_row : first_row + plan.rows]
                wanted = _wanted(plan, *part.shape)
                result = self._respond(inputs, row_of_weights, wanted)
                part[:] = result[0, wanted]
                c1[chunk * len(weights) + index] = result[1]
        self._count(responses, blocks)
        return EvaluatedRows(c1=c1, c0=c0)

    def _inputs(self, ids: npt.NDArray[np.uint64], seeds: bytes, b: Residues, which: range) -> list[Ciphertext]:
        own = seeds[SEED_BYTES * which.start : SEED_BYTES * which.stop]
        a = self._expander.expand(ids[which.start : which.stop].tolist(), own)
        return [self._context.ciphertext(b[index], uniform) for index, uniform in zip(which, a, strict=True)]

    def _respond(
        self, inputs: list[Ciphertext], weights: Sequence[Plaintext], wanted: npt.NDArray[np.intp]
    ) -> Residues:
        """uint32 [2, N] coefficients modulo the first prime."""
        context = self._context
        total = self._product(inputs, weights)
        context.crypto.EvalAddInPlace(total, self._encryption_of_zero())
        total = self._flooded(total, wanted)
        context.switch(total)
        return context.coefficients(total)

    def _product(self, inputs: list[Ciphertext], weights: Sequence[Plaintext]) -> Ciphertext:
        """Σ_blocks c·Ŵ."""
        crypto = self._context.crypto
        total = crypto.EvalMult(inputs[0], weights[0])
        for ciphertext, plaintext in zip(inputs[1:], weights[1:], strict=True):
            crypto.EvalAddInPlace(total, crypto.EvalMult(ciphertext, plaintext))
        return total

    def _encryption_of_zero(self) -> Ciphertext:
        """(pk0·u + e0, pk1·u + e1), u ternary, fresh from OpenFHE's generator; used once."""
        return self._context.crypto.Encrypt(self._public_key, self._nothing)

    def _flooded(self, total: Ciphertext, wanted: npt.NDArray[np.intp]) -> Ciphertext:
        """c0 + f at the wanted coefficients."""
        places = wanted.reshape(-1)
        for index, limb in enumerate(flood.limbs(self.parameters.flood_bits, len(places))):
            polynomial = np.zeros(self.parameters.degree)
            polynomial[places] = limb
            total.SetNoiseScaleDeg(index + 1)  # that of the limb, or OpenFHE would scale one of them up
            total = self._context.crypto.EvalAdd(total, self._context.plaintext(polynomial, index + 1))
        return total

    def _count(self, responses: int, blocks: int) -> None:
        primes = len(self.parameters.primes)
        limbs = flood.limb_count(self.parameters.flood_bits)
        # u, e0, e1 and the limbs of f; per polynomial, each dropped prime back and what is left forth; c0, c1 back.
        transforms = primes * (3 + limbs) + 2 * sum(range(2, primes + 1)) + 2
        with self._lock:
            self.counters.transforms += transforms * responses
            self.counters.products += blocks * responses
            self.counters.additions += blocks * responses
            self.counters.rerandomisations += responses
            self.counters.modulus_switches += responses


def _wanted(plan: Plan, tokens: int, rows: int) -> npt.NDArray[np.intp]:
    """[tokens, rows]: the coefficients of their products."""
    row, token = np.arange(rows), np.arange(tokens)[:, None]
    return plan.tokens * (row * plan.channels + plan.channels - 1) + token


@dataclass(frozen=True, slots=True)
class OpenFheEngine:
    """Implements `Engine`, without pools."""

    library: Library
    name: str = "openfhe"

    @classmethod
    def load(cls) -> OpenFheEngine:
        """Raises ConfigurationError where OpenFHE cannot run."""
        return cls(load_library())

    def encode(self, weights: GroupWeights, parameters: ParameterSet, plans: Iterable[Plan]) -> OpenFheGroup:
        return OpenFheGroup(shared_context(self.library, parameters), weights, plans)

    def evaluator(
        self, parameters: ParameterSet, pk0: Residues, pk1_seed: bytes, session_id: bytes
    ) -> OpenFheEvaluator:
        return OpenFheEvaluator(shared_context(self.library, parameters), pk0, pk1_seed, session_id)

    def close(self) -> None:
        """Nothing is made ahead."""
