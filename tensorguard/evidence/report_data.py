"""Report data: the 64 bytes in evidence that bind it to one challenge, one set of keys and one purpose."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tensorguard.evidence import transcript
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import PublicIdentity


@dataclass(frozen=True, slots=True)
class Binding:
    """What evidence is made over. The report data binds everything; the rest is for platforms with a field for it."""

    report_data: bytes
    """64 bytes."""
    nonce: bytes
    """The attestor's challenge."""
    public_key: bytes
    """The workload's signing key, DER SubjectPublicKeyInfo."""


def binding(
    nonce: bytes,
    identity: PublicIdentity,
    *,
    attestor_thumbprint: str,
    tenant: str,
    role: Role,
    package_id: str = "",
    tls_key: bytes = b"",
) -> Binding:
    """What evidence for one exchange is made over. Raises InvalidInputError when the signing key is no key."""
    data = report_data(
        nonce,
        identity,
        attestor_thumbprint=attestor_thumbprint,
        tenant=tenant,
        role=role,
        package_id=package_id,
        tls_key=tls_key,
    )
    return Binding(data, nonce, identity.signing_key_spki)


def report_data(
    nonce: bytes,
    identity: PublicIdentity,
    *,
    attestor_thumbprint: str,
    tenant: str,
    role: Role,
    package_id: str = "",
    tls_key: bytes = b"",
) -> bytes:
    """SHA-512 over "tssp-attest/v1" and the length-prefixed fields, in the order of docs/attestation.md.

    `attestor_thumbprint` is in it so that evidence made for one attestor is of no use at another.
    """
    return hashlib.sha512(
        transcript.encode(
            transcript.ATTEST,
            nonce,
            identity.signing_key,
            identity.hpke_key,
            tls_key,
            attestor_thumbprint,
            tenant,
            role.value,
            package_id,
        )
    ).digest()


def gpu_nonce(report_data: bytes) -> bytes:
    """What the GPUs of a host are challenged with: SHA-256 over "tssp-gpu-nonce/v1" and the host's report data.

    It follows from the report data, so that one exchange covers the host and its GPUs.
    """
    return hashlib.sha256(transcript.encode(transcript.GPU_NONCE, report_data)).digest()
