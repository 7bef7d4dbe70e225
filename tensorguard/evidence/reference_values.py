"""Reference values (RFC 9334): the measurements that a policy names, derived from what is to run.

Only what can be derived honestly: this code for simulated evidence, a Nitro image from what AWS's own tool says of it.
The registers of TDX and SEV-SNP depend on firmware, hypervisor and machine shape besides the image; they are taken from
verified evidence of a machine that runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import REQUIRED_MEASUREMENTS, Claims, EvidenceKind
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.policy import MeasurementTuple

MAX_DESCRIPTION_BYTES = 64 * 1024
_PCR = re.compile(r"[0-9a-f]{96}\Z")
_NITRO_REGISTERS = {"PCR0": True, "PCR1": True, "PCR2": True, "PCR8": False}
"""Image, kernel with boot file system, application: always there. PCR8 (signer) is there for a signed image."""
_NITRO_CHECKS = {"CheckCRC": "its checksum is wrong", "SignatureCheck": "its signature does not verify"}


def of_this_code() -> MeasurementTuple:
    """What simulated evidence of this installation reports: it is for the same code in every installation."""
    return MeasurementTuple(evidence_kind=EvidenceKind.SIMULATED, values={"code": code_measurement()})


def of_nitro_image(description: bytes) -> MeasurementTuple:
    """From the JSON that `nitro-cli build-enclave` or `nitro-cli describe-eif` prints about an enclave image file.

    Raises ConfigurationError when it is something else, or says that the image is damaged, and for the zeros that an
    enclave in debug mode reports.
    """
    if len(description) > MAX_DESCRIPTION_BYTES:
        raise ConfigurationError(f"what nitro-cli prints about an image has at most {MAX_DESCRIPTION_BYTES} bytes")
    try:
        document = json.loads(description)
    except (ValueError, RecursionError):
        document = None
    measured = document.get("Measurements") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(measured, dict):
        raise ConfigurationError(
            "this is not the JSON that `nitro-cli build-enclave` and `nitro-cli describe-eif` print: it has no object "
            "'Measurements'"
        )
    for name, problem in _NITRO_CHECKS.items():
        if document.get(name) is False:
            raise ConfigurationError(f"nitro-cli says of this image that {problem}; build it again")
    if not str(measured.get("HashAlgorithm", "")).startswith("Sha384"):
        raise ConfigurationError("the image is not measured with SHA-384, as enclaves are")
    names = [name for name, required in _NITRO_REGISTERS.items() if required or name in measured]
    values = {name.lower(): _pcr(name, measured.get(name)) for name in names}
    return MeasurementTuple(evidence_kind=EvidenceKind.NITRO, values=values)


def of_evidence(claims: Claims, registers: Sequence[str] = ()) -> MeasurementTuple:
    """What a reference machine reported, in evidence that has been verified: the registers that a tuple must name, and
    `registers` besides.

    That the machine ran the right image is for whoever started it to know. Raises EvidenceRefusedError for a platform
    in debug mode and ConfigurationError for a register that its kind has not.
    """
    if claims.debug:
        raise EvidenceRefusedError(
            "the reference machine is in debug mode, where its operator can change what runs: start it without",
            "debug_enabled",
        )
    names = [*sorted(REQUIRED_MEASUREMENTS[claims.kind]), *registers]
    if unknown := [name for name in names if name not in claims.measurements]:
        raise ConfigurationError(
            f"{claims.kind.value} evidence has no register {', '.join(unknown)}; it has "
            f"{', '.join(sorted(claims.measurements))}"
        )
    return MeasurementTuple(evidence_kind=claims.kind, values={name: claims.measurements[name] for name in names})


def _pcr(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _PCR.match(value):
        raise ConfigurationError(f"{name} of the image is not there, or not 48 bytes in lower-case hex")
    if not value.strip("0"):
        raise ConfigurationError(f"{name} is zero, as in an enclave in debug mode, where nothing is measured")
    return value
