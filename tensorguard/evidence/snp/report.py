"""The SEV-SNP attestation report: ATTESTATION_REPORT in AMD's SEV-SNP ABI (56860), versions 2, 3 and 5."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.snp.claims import GuestPolicy, PlatformInfo, SigningKey
from tensorguard.evidence.snp.product import Product

REPORT_BYTES = 1184
SIGNED_BYTES = 0x2A0
VERSIONS = (2, 3, 5)
# Offset 0x000: version .. key information; 0x050: what the guest is; 0x180: where it runs; 0x2a0: signature.
_HEADER = struct.Struct("<IIQ16s16sII8sQI4s")
_GUEST = struct.Struct("<64s48s32s48s48s32s32s")
_MACHINE = struct.Struct("<8s3s21s64s8s4s4s8sQQ152s")
_SIGNATURE = struct.Struct("<72s72s368s")
_ECDSA_P384_SHA384 = 1
_SIGNING_KEYS = {0: SigningKey.VCEK, 1: SigningKey.VLEK}
_SIGNING_KEY_NONE = 7
_POLICY_ALWAYS_ONE = 1 << 17
_POLICY_BITS = 26


@dataclass(frozen=True, slots=True)
class AttestationReport:
    """A well-formed report. That it is signed is not yet known."""

    version: int
    guest_svn: int
    guest_policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    """TCB versions are 8 bytes, whose meaning the product decides (`TcbVersion.from_bytes`)."""
    platform: PlatformInfo
    signing_key: SigningKey
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int] | None
    """Family and model of the processor, None in version 2."""
    chip_id: bytes
    """64 bytes, all zero where the operator masks it."""
    committed_tcb: bytes
    current_firmware: str
    committed_firmware: str
    launch_tcb: bytes
    launch_mitigations: int | None
    current_mitigations: int | None
    signed: bytes
    """What the signature is over."""
    signature: bytes
    """ECDSA signature, DER."""

    @property
    def product(self) -> Product | None:
        """The processor line that the report itself names, None in version 2 and for an unknown processor."""
        return Product.from_cpuid(*self.cpuid) if self.cpuid else None


def parse_report(data: bytes) -> AttestationReport:
    """The fields of a report of exactly 1184 bytes.

    Raises EvidenceRefusedError: `malformed`, `report_version_not_supported`, `report_not_signed`, `chip_key_masked`
    or `guest_policy_unknown`. Reserved bytes must be zero, so that a later version's meaning is never passed over; only
    unknown bits of the platform information, which real Turin machines set, are left out.
    """
    if len(data) != REPORT_BYTES:
        raise _malformed(f"a report has {REPORT_BYTES} bytes, this one has {len(data)}; supply the report alone")
    version, guest_svn, policy, family_id, image_id, vmpl, algorithm, current_tcb, platform, key_bits, reserved_1 = (
        _HEADER.unpack_from(data)
    )
    report_data, measurement, host_data, id_key_digest, author_key_digest, report_id, report_id_ma = _GUEST.unpack_from(
        data, 0x50
    )
    (
        reported_tcb,
        cpuid,
        reserved_2,
        chip_id,
        committed_tcb,
        current,
        committed,
        launch_tcb,
        launch_mitigations,
        current_mitigations,
        reserved_3,
    ) = _MACHINE.unpack_from(data, 0x180)
    r, s, reserved_4 = _SIGNATURE.unpack_from(data, SIGNED_BYTES)
    if version not in VERSIONS:
        raise EvidenceRefusedError(
            f"report version {version} is not supported, only {', '.join(map(str, VERSIONS))}",
            "report_version_not_supported",
        )
    if algorithm != _ECDSA_P384_SHA384:
        raise _malformed(f"signature algorithm {algorithm} is not ECDSA P-384 with SHA-384")
    reserved = [reserved_1, reserved_2, reserved_3, reserved_4, current[3:], committed[3:]]
    if version < 3:
        reserved.append(cpuid)
    if any(any(field) for field in reserved) or (version < 5 and (launch_mitigations or current_mitigations)):
        raise _malformed(f"bytes that are reserved in version {version} are not zero")
    signing_key = _signing_key(key_bits)
    if not key_bits & 1 and any(author_key_digest):
        raise _malformed("the report has an author key digest, but says that there is no author key")
    return AttestationReport(
        version=version,
        guest_svn=guest_svn,
        guest_policy=_guest_policy(policy),
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        current_tcb=current_tcb,
        platform=_platform_info(platform),
        signing_key=signing_key,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid=(cpuid[0], cpuid[1]) if version >= 3 else None,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current_firmware=_firmware(current),
        committed_firmware=_firmware(committed),
        launch_tcb=launch_tcb,
        launch_mitigations=launch_mitigations if version >= 5 else None,
        current_mitigations=current_mitigations if version >= 5 else None,
        signed=data[:SIGNED_BYTES],
        signature=encode_dss_signature(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
    )


def _signing_key(bits: int) -> SigningKey:
    if bits >> 5:
        raise _malformed("reserved bits of the key information are set")
    if bits & 2:
        raise EvidenceRefusedError(
            "the operator masks the chip's key, so the report has no signature; turn MASK_CHIP_KEY off on the machine",
            "chip_key_masked",
        )
    selector = bits >> 2 & 7
    if selector == _SIGNING_KEY_NONE:
        raise EvidenceRefusedError(
            "the report says that no key signed it; ask for one signed by VCEK or VLEK", "report_not_signed"
        )
    if selector not in _SIGNING_KEYS:
        raise _malformed(f"signing key {selector} is not defined")
    return _SIGNING_KEYS[selector]


def _guest_policy(bits: int) -> GuestPolicy:
    if not bits & _POLICY_ALWAYS_ONE:
        raise _malformed("bit 17 of the guest policy must be one")
    if bits >> _POLICY_BITS:
        # Such a bit may loosen the guest's protection, as CXL_ALLOW did when it was new.
        raise EvidenceRefusedError(
            f"the guest policy {bits:#x} has bits that this version does not know; launch the guest without them",
            "guest_policy_unknown",
        )
    return GuestPolicy(
        abi_major=bits >> 8 & 0xFF,
        abi_minor=bits & 0xFF,
        smt=bool(bits >> 16 & 1),
        migration_agent=bool(bits >> 18 & 1),
        debug=bool(bits >> 19 & 1),
        single_socket=bool(bits >> 20 & 1),
        cxl=bool(bits >> 21 & 1),
        memory_aes_256_xts=bool(bits >> 22 & 1),
        rapl_disabled=bool(bits >> 23 & 1),
        ciphertext_hiding=bool(bits >> 24 & 1),
        page_swap_disabled=bool(bits >> 25 & 1),
    )


def _platform_info(bits: int) -> PlatformInfo:
    return PlatformInfo(
        smt=bool(bits & 1),
        tsme=bool(bits >> 1 & 1),
        ecc=bool(bits >> 2 & 1),
        rapl_disabled=bool(bits >> 3 & 1),
        ciphertext_hiding=bool(bits >> 4 & 1),
        alias_check=bool(bits >> 5 & 1),
        tio=bool(bits >> 7 & 1),
    )


def _firmware(version: bytes) -> str:
    return f"{version[2]}.{version[1]}.{version[0]}"


def _malformed(problem: str) -> EvidenceRefusedError:
    return EvidenceRefusedError(f"the SEV-SNP report is malformed: {problem}", "malformed")
