"""An OpenFHE context in the ring of one of our parameter sets, and the way between its objects and our residues.

OpenFHE chooses primes itself and offers no way to give it others. But a context can be serialised as JSON, where its
moduli and roots of unity are plain numbers, and a context read back from there with our moduli computes modulo those.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.ntt import forward_all, inverse_all
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.ckks.ring import Residues, ring
from tensorguard.engines.openfhe.blobs import Template, read
from tensorguard.engines.openfhe.embedding import LIMB_BITS, slots
from tensorguard.engines.openfhe.library import Library
from tensorguard.errors import ConfigurationError

Ciphertext = Any
PublicKey = Any
Plaintext = Any
"""OpenFHE's objects; its module has no type stubs."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Context:
    """Position i of OpenFHE's transform of prime k holds what ours has at ``order[k, i]``."""

    library: Library
    crypto: Any
    parameters: ParameterSet
    ciphertexts: Template
    public_keys: Template
    zero: Ciphertext
    """(0, 0)."""
    order: npt.NDArray[np.intp]

    def plaintext(self, coefficients: npt.NDArray[np.float64], degree: int = 1) -> Plaintext:
        """The polynomial with these integer coefficients [N], times 2**(30·(degree - 1))."""
        result = self.crypto.MakeCKKSPackedPlaintext(slots(coefficients), degree)
        result.SetFormat(self.library.Format.EVALUATION)  # now: products of several threads share it
        return result

    def ciphertext(self, c0: Residues, c1: Residues) -> Ciphertext:
        """Of uint32 [primes, N] in our transform order."""
        data = self.ciphertexts.write(np.stack([self._theirs(c0), self._theirs(c1)]))
        restored = self.library.DeserializeCiphertextString(data, self.library.BINARY)
        # A sum is built like its first term. Products with a restored ciphertext take five times as long.
        return self.crypto.EvalAdd(self.zero, restored)

    def public_key(self, pk0: Residues, pk1: Residues) -> PublicKey:
        """Of uint32 [primes, N] in our transform order."""
        data = self.public_keys.write(np.stack([self._theirs(pk0), self._theirs(pk1)]))
        return self.library.DeserializePublicKeyString(data, self.library.BINARY)

    def switch(self, ciphertext: Ciphertext) -> None:
        """Divide by all primes but the first, from the last on, in place."""
        ciphertext.SetNoiseScaleDeg(len(self.parameters.primes))  # OpenFHE takes one off for each prime
        for _ in self.parameters.primes[1:]:
            self.crypto.RescaleInPlace(ciphertext)

    def coefficients(self, ciphertext: Ciphertext) -> Residues:
        """uint32 [2, N], c0 and c1 of a switched ciphertext in natural order, modulo the first prime."""
        data = self.library.Serialize(ciphertext, self.library.BINARY)
        theirs = read(data, self.parameters.primes[:1], self.parameters.degree)
        ours = np.empty(theirs.shape, np.uint32)
        ours[..., self.order[0]] = theirs
        result = np.empty_like(ours)
        constants = ring(self.parameters)
        inverse_all(ours, result, constants.factors[:1], constants.primes[:1])
        return result[:, 0]

    def _theirs(self, residues: Residues) -> Residues:
        theirs: Residues = np.take_along_axis(residues, self.order, axis=1)
        return theirs


EXCLUSIVE = threading.RLock()
"""Held by whoever uses OpenFHE. Its calls release the interpreter lock, and it keeps one table of roots of unity for
each prime of a process, which it makes anew when a prime is used at another ring degree.
"""
_contexts: dict[ParameterSet, Context] = {}


def shared_context(library: Library, parameters: ParameterSet) -> Context:
    """The one context of this parameter set in this process.

    Raises ConfigurationError if this version of OpenFHE does not take our ring.
    """
    with EXCLUSIVE:
        if parameters not in _contexts:
            _contexts[parameters] = _make(library, parameters)
        return _contexts[parameters]


def _make(library: Library, parameters: ParameterSet) -> Context:
    primes, degree = parameters.primes, parameters.degree
    crypto = _with_our_primes(library, parameters)
    keys = crypto.KeyGen()  # only the form of what it makes is used
    nothing = crypto.MakeCKKSPackedPlaintext(np.zeros(degree // 2, np.complex128))
    binary = library.BINARY
    sample = crypto.Encrypt(keys.publicKey, nothing)
    zero = crypto.EvalSub(sample, sample)
    ciphertexts = Template.of(library.Serialize(zero, binary), primes, degree)
    public_keys = Template.of(library.Serialize(keys.publicKey, binary), primes, degree)
    x = crypto.EvalAdd(zero, crypto.MakeCKKSPackedPlaintext(slots(np.eye(1, degree, 1)[0])))
    order = _order(parameters, read(library.Serialize(x, binary), primes, degree)[0])
    return Context(library, crypto, parameters, ciphertexts, public_keys, zero, order)


def _with_our_primes(library: Library, parameters: ParameterSet) -> Any:
    """A context as OpenFHE makes it, with our primes put in. Security is `ParameterSet`'s to check."""
    choice = library.CCParamsCKKSRNS()
    choice.SetSecurityLevel(library.SecurityLevel.HEStd_NotSet)
    choice.SetRingDim(parameters.degree)
    choice.SetBatchSize(parameters.degree // 2)
    choice.SetMultiplicativeDepth(len(parameters.primes) - 1)
    choice.SetFirstModSize(LIMB_BITS)
    choice.SetScalingModSize(LIMB_BITS)
    choice.SetScalingTechnique(library.ScalingTechnique.FIXEDMANUAL)
    choice.SetKeySwitchTechnique(library.KeySwitchTechnique.BV)
    choice.SetSecretKeyDist(library.SecretKeyDist.UNIFORM_TERNARY)
    choice.SetCKKSDataType(library.CKKSDataType.COMPLEX)
    own = library.GenCryptoContext(choice)
    own.Enable(library.PKESchemeFeature.PKE)
    own.Enable(library.PKESchemeFeature.LEVELEDSHE)
    try:
        description = json.loads(library.Serialize(own, library.JSON))
        _patch(description, parameters)
        crypto = library.DeserializeCryptoContextString(json.dumps(description, indent=4), library.JSON)
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise _unfit() from None
    if crypto.GetRingDimension() != parameters.degree or crypto.GetModulus() != float(parameters.modulus):
        raise _unfit()
    return crypto


def _patch(description: dict[str, Any], parameters: ParameterSet) -> None:
    base = description["value0"]["ptr_wrapper"]["data"]["cc"]["ptr_wrapper"]["data"]
    ring_parameters = base["value0"]["value0"]["value0"]["elp"]["ptr_wrapper"]["data"]
    q = parameters.modulus
    words = [q >> shift & (2**64 - 1) for shift in range(0, q.bit_length(), 64)]
    ring_parameters["value0"]["cm"].update(v=words, m=q.bit_length())
    for tower, prime in zip(ring_parameters["p"], parameters.primes, strict=True):
        values = tower["ptr_wrapper"]["data"]["value0"]
        values["cm"]["v"], values["ru"]["v"] = prime, _smallest_root(prime, 2 * parameters.degree)


def _smallest_root(prime: int, order: int) -> int:
    """The primitive root of unity that OpenFHE takes: it keeps tables for each modulus, whichever context asks."""
    candidates = (pow(g, (prime - 1) // order, prime) for g in range(2, prime))
    root = next(candidate for candidate in candidates if pow(candidate, order // 2, prime) == prime - 1)
    return min(pow(root, k, prime) for k in range(1, order, 2))


def _order(parameters: ParameterSet, points: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """[primes, N] from both transforms of X, whose values are the N different points of the transform. Those of
    OpenFHE are given [primes, N].
    """
    constants = ring(parameters)
    x = np.zeros((1, len(parameters.primes), parameters.degree), np.uint32)
    x[..., 1] = 1
    ours = np.empty_like(x)
    forward_all(x, ours, constants.factors, constants.primes)
    order = np.empty(points.shape, np.intp)
    for index, (own, other) in enumerate(zip(ours[0], points, strict=True)):
        order[index, np.argsort(other)] = np.argsort(own)
    if not np.array_equal(np.take_along_axis(ours[0], order, axis=1), points):
        raise _unfit()
    return order


def _unfit() -> ConfigurationError:
    return ConfigurationError(
        "this version of openfhe does not take the primes of our parameter sets: install the version that "
        "pip install 'tensafe[openfhe]' chooses, or choose --backend cpu"
    )
