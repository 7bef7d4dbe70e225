"""Identities for tests of TLS, by an authority of the test."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.tls import TlsIdentity


def tls_identity(
    authority: Authority, name: ServiceName, *, ago: float = 0, life: float = 300, trusts: Authority | None = None
) -> TlsIdentity:
    """Issued `ago` seconds ago; knows others by `trusts`, by default the same authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue(key.public_key(), name, now=time.time() - ago, life_seconds=life)
    return TlsIdentity(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(serialization.Encoding.PEM),
        (trusts or authority).pem,
    )
