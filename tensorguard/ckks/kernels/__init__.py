"""Compiled inner loops of sampling, encryption, evaluation and decryption.

All residues are uint32 modulo primes below 2**30; "lazy" values may exceed the prime as each docstring says.
Nothing branches on, indexes by or divides by a secret. One call handles a whole request, so call overhead is
paid once.
"""

from tensorguard.ckks.kernels.evaluation import (
    add_encryption_of_zero,
    add_error,
    add_made_ahead,
    all_reduced,
    encode_weights,
    encrypt_zero,
    evaluate,
    multiply,
    recover,
    switch_modulus,
)
from tensorguard.ckks.kernels.host import add_messages, decrypt, encrypt, normalise
from tensorguard.ckks.kernels.sampling import (
    ERROR_HALF_WIDTH,
    FLOOD_TERMS,
    accept_ternary,
    centred_binomial,
    error_values,
    error_words,
    expand,
    flood,
    flood_limbs,
)

__all__ = [
    "ERROR_HALF_WIDTH",
    "FLOOD_TERMS",
    "accept_ternary",
    "add_encryption_of_zero",
    "add_error",
    "add_made_ahead",
    "add_messages",
    "all_reduced",
    "centred_binomial",
    "decrypt",
    "encode_weights",
    "encrypt",
    "encrypt_zero",
    "error_values",
    "error_words",
    "evaluate",
    "expand",
    "flood",
    "flood_limbs",
    "multiply",
    "normalise",
    "recover",
    "switch_modulus",
]
