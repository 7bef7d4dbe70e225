"""Finds the real quotes, reports and collateral that tests use where a machine has them; they are not ours to copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "TENSAFE_ATTESTATION_VECTORS"
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "attestation-vectors"


def vector_directory(name: str) -> Path:
    """The folder of one kind (`tdx`, `snp`, `nitro`, `nvidia`). Skips the test, saying so, where there is none.

    It is looked for in the folder that TENSAFE_ATTESTATION_VECTORS names, or beside the checkout.
    """
    folder = Path(os.environ.get(VARIABLE) or _BESIDE) / name
    if not folder.is_dir():
        pytest.skip(f"no real attestation vectors on this machine: {folder} is not there; set {VARIABLE}")
    return folder
