"""What the OpenFHE engines share: a CKKS context with one 60-bit prime, encryption under the secret key, sizes.

One prime and no rescaling is the fastest way to a product of depth one in OpenFHE: the scales of data and weights are
chosen so that the product fits. Slots are complex (CKKSDataType COMPLEX), so that nothing is spent on keeping
imaginary parts at zero. Encryption under the secret key is cheaper and less noisy than under the public one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openfhe

SCALE_BITS = 25
PRODUCT_BITS = 56
"""Bits of the product's scale below the 60-bit prime: values up to 8 fit, results here have deviation 1."""
Complex = np.ndarray[Any, np.dtype[np.complex128]]


@dataclass(frozen=True)
class RingKind:
    """A ring degree with a key-switching method, and how many of the product's bits the data get.

    Key switching adds its noise to the data, rounding hits data and weights.
    """

    degree: int
    data_bits: int
    hybrid: bool = False
    """Hybrid key switching, with a prime of its own, or BV: decomposition into digits of 10 bits."""

    @property
    def name(self) -> str:
        return f"N = {self.degree}, {'hybrid' if self.hybrid else 'BV'} key switching, q of 60 bits"


class Ring:
    """A context, a key pair, keys for the given rotations."""

    def __init__(self, kind: RingKind, rotations: list[int]) -> None:
        parameters = openfhe.CCParamsCKKSRNS()
        parameters.SetSecurityLevel(openfhe.SecurityLevel.HEStd_128_classic)
        parameters.SetRingDim(kind.degree)
        parameters.SetFirstModSize(60)
        parameters.SetScalingModSize(SCALE_BITS)
        parameters.SetMultiplicativeDepth(0)
        parameters.SetScalingTechnique(openfhe.ScalingTechnique.FIXEDMANUAL)
        parameters.SetCKKSDataType(openfhe.CKKSDataType.COMPLEX)
        parameters.SetBatchSize(kind.degree // 2)
        if kind.hybrid:
            parameters.SetKeySwitchTechnique(openfhe.KeySwitchTechnique.HYBRID)
        else:
            parameters.SetKeySwitchTechnique(openfhe.KeySwitchTechnique.BV)
            parameters.SetDigitSize(10)
        # Contexts and keys live in tables of the library; those of the case before would only take memory.
        openfhe.CryptoContext.ClearEvalAutomorphismKeys()
        openfhe.ReleaseAllContexts()
        self.context = openfhe.GenCryptoContext(parameters)
        features = openfhe.PKESchemeFeature
        for feature in (features.PKE, features.KEYSWITCH, features.LEVELEDSHE):
            self.context.Enable(feature)
        self.keys = self.context.KeyGen()
        self.slots = kind.degree // 2
        self._data_factor = 2.0 ** (kind.data_bits - SCALE_BITS)
        self.weight_factor = 2.0 ** (PRODUCT_BITS - kind.data_bits - SCALE_BITS)
        self.key_bytes = 0
        if rotations:
            self.context.EvalRotateKeyGen(self.keys.secretKey, rotations)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "keys"
                self.context.SerializeEvalAutomorphismKey(str(path), openfhe.BINARY)
                self.key_bytes = path.stat().st_size

    def weights(self, values: Complex) -> Any:
        """A plaintext of complex [slots]."""
        return self.context.MakeCKKSPackedPlaintext(values * self.weight_factor)

    def encrypt(self, values: Complex) -> Any:
        """A ciphertext of complex [slots]."""
        plaintext = self.context.MakeCKKSPackedPlaintext(values * self._data_factor)
        return self.context.Encrypt(self.keys.secretKey, plaintext)

    def decrypt(self, ciphertext: Any) -> Complex:
        """Complex [slots] of a product of data and weights."""
        plaintext = self.context.Decrypt(ciphertext, self.keys.secretKey)
        plaintext.SetLength(self.slots)
        # Under one prime, OpenFHE 1.6.1 decodes a ciphertext of degree two too large by one scale.
        factor = 2.0**-SCALE_BITS / (self._data_factor * self.weight_factor)
        return np.asarray(plaintext.GetCKKSPackedValueArray()) * factor

    def size(self, ciphertext: Any) -> int:
        """Bytes of a ciphertext as OpenFHE writes it."""
        return len(openfhe.Serialize(ciphertext, openfhe.BINARY))

    def sum_of_products(self, ciphertexts: list[Any], plaintexts: list[Any]) -> Any:
        total = self.context.EvalMult(ciphertexts[0], plaintexts[0])
        for ciphertext, plaintext in zip(ciphertexts[1:], plaintexts[1:], strict=True):
            self.context.EvalAddInPlace(total, self.context.EvalMult(ciphertext, plaintext))
        return total
