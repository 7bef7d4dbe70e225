"""GPU reports: the real ones, those of our own root, and attacks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.nvidia.claims import GpuClaims
from tensorguard.evidence.nvidia.spdm import MAX_REPORT_BYTES
from tensorguard.evidence.nvidia.verifier import (
    MAX_EVIDENCE_BYTES,
    MAX_GPUS,
    NVIDIA_DEVICE_IDENTITY_ROOT_SHA256,
    GpuVerifier,
)
from tensorguard.store.revocations import RevocationKind, Subject
from tests.support.attestation_vectors import vector_directory
from tests.support.synthetic_pki.certificates import NOW
from tests.support.synthetic_pki.nvidia import FIRMWARE, MEASUREMENTS, MODEL, NONCE, OPAQUE, Gpu, dice, evidence

GPU = Gpu.create()
GOOD = evidence(GPU.device())


def verify(data: bytes, gpu: Gpu = GPU, *, at: float = NOW) -> tuple[GpuClaims, ...]:
    return GpuVerifier([gpu.root]).verify(data, at=at)


def reason(data: bytes, gpu: Gpu = GPU, *, at: float = NOW, roots: list[str] | None = None) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        GpuVerifier([gpu.root] if roots is None else roots).verify(data, at=at)
    return refused.value.detail


def of_report(**changes: Any) -> str:
    return reason(evidence(GPU.device(GPU.report(**changes))))


def test_claims() -> None:
    (gpu,) = verify(GOOD)
    assert gpu == GpuClaims(
        nonce=NONCE,
        device_id=GPU.device_id,
        model=MODEL,
        driver_version="590.12",
        vbios_version="96.00.A5.00.01",
        measurements={str(index): value.hex() for index, value in MEASUREMENTS.items()},
    )


@pytest.mark.parametrize(
    ("serial", "text"), [(0xB2C3D4E5F60718293, "0b2c3d4e5f60718293"), (0x41 << 64, "41" + "00" * 8)]
)
def test_a_serial_number_is_whole_bytes(serial: int, text: str) -> None:
    """As a policy lists it, and as `tensafe revoke chip` takes it."""
    gpu = Gpu.create(serial=serial)
    assert verify(evidence(gpu.device()), gpu)[0].device_id == text
    Subject(RevocationKind.CHIP, value=text).validate()


def test_no_byte_of_a_report_can_be_changed() -> None:
    report, device = GPU.report(), GPU.device()
    for position in range(len(report)):
        mutated = bytearray(report)
        mutated[position] ^= 1 << position % 8
        changed = {**device, "evidence": base64.b64encode(mutated).decode()}
        assert reason(evidence(changed)) == "signature"


def test_no_byte_of_a_certificate_can_be_changed() -> None:
    """But one that says nothing: how many bits of a certificate's signature are unused, where that many are zero."""
    certificates = [item.der for item in reversed(GPU.chain)]
    for number, good in enumerate(certificates):
        accepted = set()
        for position in range(len(good)):
            changed = bytearray(good)
            changed[position] ^= 1 << position % 8
            chain = b"".join(map(pem, [*certificates[:number], bytes(changed), *certificates[number + 1 :]]))
            try:
                verify(evidence({**GPU.device(), "certificate": base64.b64encode(chain).decode()}))
            except EvidenceRefusedError:
                continue
            accepted.add(position)
        signature = x509.load_der_x509_certificate(good).signature
        assert accepted <= {len(good) - len(signature) - 1}


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def test_what_is_not_signed_is_not_believed() -> None:
    assert verify(evidence({**GPU.device(), "arch": "BLACKWELL", "nonce": "ff" * 32, "driver_version": "1"})) == verify(
        GOOD
    )


def test_another_root_and_another_key() -> None:
    other = Gpu.create()
    assert reason(evidence(other.device())) == "root_not_trusted"
    assert reason(GOOD, roots=[]) == "root_not_trusted"
    assert reason(evidence({**GPU.device(), "certificate": other.device()["certificate"]})) == "signature"
    forged = Gpu([GPU.chain[0], *other.chain[1:]])
    assert reason(evidence(forged.device())) == "chain"


def test_time_and_rights_of_the_chain() -> None:
    assert reason(GOOD, at=NOW + 2 * 86400) == "certificate_expired"
    assert reason(GOOD, at=NOW - 2 * 86400) == "certificate_not_yet_valid"
    for leaf in ({"ca": True, "constraints": True}, {"usage": False}, {"digital_signature": False}):
        gpu = Gpu.create(leaf=leaf)
        assert reason(evidence(gpu.device()), gpu) == "chain"


def test_firmware_of_the_report_and_of_the_certificate() -> None:
    other = Gpu.create(leaf={"extra": dice(b"g" * 48)})
    assert reason(evidence(other.device()), other) == "firmware_mismatch"
    none = Gpu.create(leaf={"extra": None})
    assert reason(evidence(none.device()), none) == "firmware_mismatch"
    older = {kind: value for kind, value in OPAQUE.items() if kind != 20}
    verify(evidence(GPU.device(GPU.report(opaque=older))))
    assert of_report(opaque={**OPAQUE, 20: FIRMWARE[:-1]}) == "firmware_mismatch"


@pytest.mark.parametrize(
    ("opaque", "code"),
    [
        ({3: OPAQUE[3]}, "not_gpu"),
        ({6: OPAQUE[6]}, "not_gpu"),
        ({3: OPAQUE[3], 6: b"96.10.55.00.01"}, "not_gpu"),
        ({3: b"", 6: OPAQUE[6]}, "malformed"),
        ({3: b"\xff", 6: OPAQUE[6]}, "malformed"),
        ({3: b"5\n90", 6: OPAQUE[6]}, "malformed"),
        ({3: b"5" * 65, 6: OPAQUE[6]}, "malformed"),
    ],
)
def test_versions(opaque: dict[int, bytes], code: str) -> None:
    assert of_report(opaque=opaque) == code


@pytest.mark.parametrize(
    "changes",
    [
        {"request": b"\x12\xe0\x01\xff"},
        {"request": b"\x11\xe1\x01\xff"},
        {"request": b"\x11\xe0\x00\xff"},
        {"request": b"\x11\xe0\x01\x01"},
        {"response": b"\x12\x60\0\0"},
        {"response": b"\x11\x7f\0\0"},
        {"blocks": 0, "measurements": {}},
        {"blocks": 2},
        {"blocks": 4},
        {"record": b"\1\1\3\0\1\0"},
        {"record": b"\1\2\4\0\1\1\0x", "blocks": 1},
        {"record": b"\1\1\5\0\1\1\0x", "blocks": 1},
        {"record": b"\1\1\4\0\1\2\0x", "blocks": 1},
        {"record": b"\0\1\4\0\1\1\0x", "blocks": 1},
        {"record": b"\1\1\4\0\1\1\0x" * 2, "blocks": 1},
        {"opaque_length": 5},
        {"opaque_length": 0xFFFF},
        {"opaque_data": b"\3"},
        {"opaque_data": b"\3\0\5\0ab"},
        {"opaque_data": b"\3\0\1\0a" * 2},
    ],
    ids=str,
)
def test_a_signed_report_must_still_be_well_formed(changes: dict[str, Any]) -> None:
    assert of_report(**changes) == "malformed"


@given(st.binary(max_size=200))
def test_any_signed_bytes_are_refused(data: bytes) -> None:
    assert reason(evidence(GPU.device(GPU.sign(data)))) == "malformed"


def test_bounds() -> None:
    device = GPU.device()
    for data in (
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        evidence({"evidence": device["evidence"]}),
        json.dumps([{**device, "evidence": 1}]).encode(),
        evidence({**device, "evidence": ""}),
        evidence({**device, "evidence": "%%%%"}),
        evidence({**device, "certificate": ""}),
        evidence({**device, "certificate": base64.b64encode(b"-----BEGIN CERTIFICATE-----\nAA\n").decode()}),
        evidence({**device, "evidence": base64.b64encode(bytes(MAX_REPORT_BYTES + 1)).decode()}),
        GOOD.ljust(MAX_EVIDENCE_BYTES + 1),
        json.dumps([{"certificate": "", "evidence": ""}] * (MAX_GPUS + 1)).encode(),
    ):
        assert reason(data) == "malformed"
    verify(GOOD.ljust(MAX_EVIDENCE_BYTES))
    chain = base64.b64decode(device["certificate"])
    assert reason(evidence({**device, "certificate": base64.b64encode(chain * 4).decode()})) == "malformed"


def test_one_gpu_is_not_two() -> None:
    assert reason(evidence(GPU.device(), GPU.device(GPU.report(opaque={**OPAQUE, 3: b"1.1"})))) == "duplicate_gpu"
    other = Gpu.create(GPU.chain[0])
    assert len(verify(evidence(GPU.device(), other.device()))) == 2


def test_one_bad_gpu_spoils_all() -> None:
    assert reason(evidence(GPU.device(), Gpu.create().device())) == "root_not_trusted"


# Real reports: NVIDIA's certificates have no end

REAL_AT = 1_763_900_000.0


def real(*parts: str) -> bytes:
    folder = vector_directory("nvidia")
    if len(parts) == 1:
        return (folder / parts[0]).read_bytes()
    return wrap(folder, *parts)


def wrap(folder: Path, report: str, chain: str) -> bytes:
    data = bytes.fromhex((folder / report).read_text().strip())
    return evidence(
        {
            "certificate": base64.b64encode((folder / chain).read_bytes()).decode(),
            "evidence": base64.b64encode(data).decode(),
        }
    )


@pytest.mark.parametrize(
    ("files", "versions"),
    [
        (["hopper_evidence.json"], [("GH100 A01 GSP BROM", "590.12", "96.00.A5.00.01")]),
        (["hopper_evidence_cert_hold.json"], [("GH100 A01 GSP BROM", "570.86.10", "96.00.AF.00.01")]),
        (["multi_gpu_hopper.json"], [("GH100 A01 GSP BROM", "590.12", "96.00.A5.00.01")] * 4),
        (
            ["hopperAttestationReport.txt", "hopperCertChain.txt"],
            [("GH100 A01 GSP BROM", "535.86.09", "96.00.5E.00.01")],
        ),
        (
            ["blackwellAttestationReport.txt", "blackwellCertChain.txt"],
            [("GB100 A01 GSP BROM", "575.32", "97.00.88.00.0F")],
        ),
    ],
)
def test_real_reports(files: list[str], versions: list[tuple[str, str, str]]) -> None:
    data = real(*files)
    gpus = GpuVerifier().verify(data, at=REAL_AT)
    assert [(gpu.model, gpu.driver_version, gpu.vbios_version) for gpu in gpus] == versions
    assert all(len(gpu.measurements) == 64 for gpu in gpus)
    for device, gpu in zip(json.loads(data), gpus, strict=True):
        assert gpu.nonce == base64.b64decode(device["evidence"])[4:36]
        assert gpu.nonce.hex() == device.get("nonce", gpu.nonce.hex())


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["hopperAttestationReportInvalidSignature.txt", "hopperCertChain.txt"], "signature"),
        (["hopperAttestationReport.txt", "blackwellCertChain.txt"], "signature"),
        (["switch_evidence_ls10.json"], "not_gpu"),
    ],
)
def test_real_reports_that_are_refused(files: list[str], code: str) -> None:
    assert reason(real(*files), roots=[NVIDIA_DEVICE_IDENTITY_ROOT_SHA256], at=REAL_AT) == code
