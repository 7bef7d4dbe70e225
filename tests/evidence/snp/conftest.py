from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims
from tensorguard.evidence.snp.verifier import SnpVerifier
from tests.support.synthetic_pki.snp import AT, Chip

Refusal = Callable[..., str]


def verify(
    chip: Chip, report: bytes | None = None, endorsements: Sequence[bytes] | None = None, at: float = AT
) -> Claims:
    supplied = chip.endorsements if endorsements is None else endorsements
    return SnpVerifier(chip.roots).verify(chip.report() if report is None else report, supplied, at=at)


@pytest.fixture
def refusal() -> Refusal:
    """The reason code with which a chip's evidence is refused."""

    def reason(chip: Chip, **arguments: object) -> str:
        with pytest.raises(EvidenceRefusedError) as refused:
            verify(chip, **arguments)  # type: ignore[arg-type]
        return refused.value.detail

    return reason
