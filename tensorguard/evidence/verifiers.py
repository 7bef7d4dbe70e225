"""The verifier of each kind of evidence. This is the one list of what can be verified."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.simulated.verifier import SimulatedVerifier

_VERIFIERS: Mapping[EvidenceKind, tuple[str, str]] = {
    EvidenceKind.TDX: ("tensorguard.evidence.tdx.verifier", "TdxVerifier"),
    EvidenceKind.SNP: ("tensorguard.evidence.snp.verifier", "SnpVerifier"),
    EvidenceKind.NITRO: ("tensorguard.evidence.nitro.verifier", "NitroVerifier"),
}
"""Kind -> module and class. A module is loaded when its kind is asked for: dcap-qvl is a library of its own."""


def verifier_of(kind: EvidenceKind, *, simulated_root: Path | None = None) -> EvidenceVerifier:
    """The verifier of a kind, which trusts the root that the kind's maker publishes.

    `simulated_root`: PEM file of the public key that simulated evidence is signed with.
    Raises ConfigurationError when the kind cannot be verified, or the key cannot be used.
    """
    if kind is EvidenceKind.SIMULATED:
        if simulated_root is None:
            raise ConfigurationError("simulated evidence needs the public key file of the root that signs it")
        return SimulatedVerifier.from_file(simulated_root)
    if kind not in _VERIFIERS:
        raise ConfigurationError(f"this version cannot verify evidence of kind {kind.value}; take it out of the policy")
    module, name = _VERIFIERS[kind]
    verifier: EvidenceVerifier = getattr(importlib.import_module(module), name)()
    return verifier
