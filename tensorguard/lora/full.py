"""Full mode: an adapter module s*B*A as one matrix, so that deltas are all the inference host ever learns.

No basis U exists, at d_out / r times the cost of factored mode (docs/protocol.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorguard.lora.adapter import LoraModule
from tensorguard.lora.randomness import Float64Array

SCALE_RANK = 16
"""The group's norm bound is the one of this rank: no row of integers is longer than 2^w sqrt(16 d). That is four
times the root mean square row at the Frobenius bound, and keeps the noise of encryption where rank 16 has it."""


@dataclass(frozen=True, slots=True, eq=False)
class FullProjection:
    """delta = weights @ x."""

    module: LoraModule

    @property
    def weights(self) -> Float64Array:
        """s*B*A, float64 [d_out, d_in]. Secret. Made at every access: it is d_out / r times as large as B and A."""
        return np.asarray((self.module.B.astype(np.float64) * self.module.scaling) @ self.module.A.astype(np.float64))

    @property
    def u(self) -> None:
        """There is no basis."""
        return None

    @property
    def rank(self) -> int:
        """Rows of `weights`."""
        return self.module.d_out

    @property
    def d_in(self) -> int:
        return self.module.d_in

    @property
    def d_out(self) -> int:
        return self.module.d_out
