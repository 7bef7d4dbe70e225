"""Measurements for policies: from nitro-cli's JSON, from this code, and from verified evidence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.reference_values import of_evidence, of_nitro_image, of_this_code

PCRS = {f"PCR{number}": f"{number + 1:02x}" * 48 for number in (0, 1, 2, 8)}


def description(measurements: dict[str, Any] | None = None, **more: Any) -> bytes:
    """What nitro-cli prints about an unsigned image."""
    unsigned = {name: value for name, value in PCRS.items() if name != "PCR8"}
    values = {"HashAlgorithm": "Sha384 { ... }", **(unsigned if measurements is None else measurements)}
    return json.dumps({"Measurements": values, **more}).encode()


def test_of_an_enclave_image() -> None:
    found = of_nitro_image(description())
    assert found.evidence_kind is EvidenceKind.NITRO
    assert found.values == {f"pcr{number}": PCRS[f"PCR{number}"] for number in (0, 1, 2)}


def test_the_signer_of_an_image_is_named() -> None:
    described = description(PCRS, EifVersion=4, CheckCRC=True, IsSigned=True, SignatureCheck=True)
    assert of_nitro_image(described).values["pcr8"] == PCRS["PCR8"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "has no object 'Measurements'"),
        (b"[]", "has no object 'Measurements'"),
        (b"[" * 60_000, "has no object 'Measurements'"),
        (b'{"Measurements": []}', "has no object 'Measurements'"),
        (b"\xff" * 10, "has no object 'Measurements'"),
        (description() + b" " * 65_536, "at most 65536 bytes"),
        (description({**PCRS, "HashAlgorithm": "Sha256 { ... }"}), "SHA-384"),
        (description({name: PCRS[name] for name in ("PCR0", "PCR1")}), "PCR2 of the image is not there"),
        (description({**PCRS, "PCR1": PCRS["PCR1"].replace("0", "O")}), "PCR1"),
        (description({**PCRS, "PCR1": PCRS["PCR1"][2:]}), "PCR1"),
        (description({**PCRS, "PCR8": None}), "PCR8"),
        (description({**PCRS, "PCR0": "00" * 48}), "PCR0 is zero"),
        (description(CheckCRC=False), "checksum"),
        (description(SignatureCheck=False), "signature does not verify"),
    ],
)
def test_other_descriptions_are_refused(given: bytes, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        of_nitro_image(given)


def test_of_this_code() -> None:
    found = of_this_code()
    assert (found.evidence_kind, found.values) == (EvidenceKind.SIMULATED, {"code": code_measurement()})


CLAIMS = Claims(
    EvidenceKind.SNP,
    {"measurement": "ab" * 48, "host_data": "cd" * 32},
    report_data=bytes(64),
    issued_at=None,
    debug=False,
)


def test_of_a_reference_machine() -> None:
    assert of_evidence(CLAIMS).values == {"measurement": "ab" * 48}
    assert of_evidence(CLAIMS, ["host_data"]).values == {"measurement": "ab" * 48, "host_data": "cd" * 32}
    with pytest.raises(ConfigurationError, match="no register mrtd; it has host_data, measurement"):
        of_evidence(CLAIMS, ["mrtd"])


def test_a_reference_machine_in_debug_mode_is_refused() -> None:
    with pytest.raises(EvidenceRefusedError) as refused:
        of_evidence(replace(CLAIMS, debug=True))
    assert refused.value.detail == "debug_enabled"
