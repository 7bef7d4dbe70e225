"""Report data: the 64 bytes in evidence that bind it to one challenge, one set of keys and one purpose."""

from __future__ import annotations

import hashlib

from tensorguard.evidence import transcript
from tensorguard.evidence.claims import Role
from tensorguard.evidence.identity import PublicIdentity


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
