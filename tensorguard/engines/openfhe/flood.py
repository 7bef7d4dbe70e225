"""The flood f of docs/protocol.md ("Evaluation", step 3) in pieces that OpenFHE encodes exactly.

f is the sum of four independent uniform signed integers, too wide for the doubles that plaintexts are made from.
So each integer is drawn in limbs of 30 bits, f = Σ_k limb_k·2^(30k), and every limb becomes a plaintext.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensorguard.ckks.randomness import SecretStream
from tensorguard.engines.openfhe.embedding import LARGEST_COEFFICIENT_BITS, LIMB_BITS

SUMMANDS = 4
_CARRY_BITS = 2
"""Four summands make a limb's sum two bits longer."""


def limb_count(bits: int) -> int:
    """Limbs of one summand of this width; the highest one takes what the others leave."""
    highest = LARGEST_COEFFICIENT_BITS - _CARRY_BITS
    return 1 + max(0, -(-(bits - highest) // LIMB_BITS))


def limbs(bits: int, outputs: int) -> npt.NDArray[np.float64]:
    """float64 [limbs, outputs], integers: the flood of this many coefficients, fresh and used once."""
    count = limb_count(bits)
    words = SecretStream("re-randomisation").words(count, SUMMANDS, outputs)
    widths = np.array([LIMB_BITS] * (count - 1) + [bits - LIMB_BITS * (count - 1)], np.uint64)
    words >>= (np.uint64(64) - widths)[:, None, None]
    sums: npt.NDArray[np.int64] = words.sum(axis=1).astype(np.int64)
    sums[-1] -= SUMMANDS << (bits - 1 - LIMB_BITS * (count - 1))
    return sums.astype(np.float64)
