from __future__ import annotations

import base64
import hashlib
import json
import pickle

import pytest

from tensorguard.errors import AuthenticationError, InvalidInputError
from tensorguard.evidence.identity import PublicIdentity, WorkloadIdentity


def test_signature_verifies_only_for_the_same_key_and_bytes() -> None:
    identity, other = WorkloadIdentity.generate(), WorkloadIdentity.generate()
    signature = identity.sign(b"transcript")
    identity.public.verify(signature, b"transcript")
    for public, data in ((identity.public, b"transcripT"), (other.public, b"transcript")):
        with pytest.raises(AuthenticationError):
            public.verify(signature, data)
    with pytest.raises(AuthenticationError):
        identity.public.verify(signature + b"\x00" * 20, b"transcript")


def test_sealed_opens_only_for_the_same_key_and_info() -> None:
    identity, other = WorkloadIdentity.generate(), WorkloadIdentity.generate()
    sealed = identity.public.seal(b"secret", b"info")
    assert identity.open(sealed, b"info") == b"secret"
    for recipient, data, info in (
        (other, sealed, b"info"),
        (identity, sealed, b"other info"),
        (identity, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"info"),
        (identity, b"", b"info"),
    ):
        with pytest.raises(AuthenticationError):
            recipient.open(data, info)


def test_thumbprint_is_rfc_7638() -> None:
    public = WorkloadIdentity.generate().public
    jwk = public.jwk
    assert set(jwk) == {"kty", "crv", "x", "y"}
    text = f'{{"crv":"P-256","kty":"EC","x":"{jwk["x"]}","y":"{jwk["y"]}"}}'
    expected = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    assert public.thumbprint == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda p: PublicIdentity(p.signing_key[:-1], p.hpke_key),
        lambda p: PublicIdentity(b"\x04" + b"\x01" * 64, p.hpke_key),  # not on the curve
        lambda p: PublicIdentity(b"", p.hpke_key),
        lambda p: PublicIdentity(p.signing_key, p.hpke_key[:-1]),
        lambda p: PublicIdentity(p.signing_key, b""),
        lambda p: PublicIdentity(p.signing_key, b"\xff" * 1216),  # ML-KEM coefficients above the modulus
        lambda p: PublicIdentity(p.signing_key, p.hpke_key[:1184] + b"\x00" * 32),  # X25519 of low order
    ],
)
def test_malformed_public_keys_are_refused(change: object) -> None:
    with pytest.raises(InvalidInputError):
        change(WorkloadIdentity.generate().public).validate()  # type: ignore[operator]


def test_private_keys_do_not_show_and_do_not_leave() -> None:
    identity = WorkloadIdentity.generate()
    assert repr(identity) == f"WorkloadIdentity({identity.public.thumbprint})"
    with pytest.raises(TypeError):
        pickle.dumps(identity)
    with pytest.raises(TypeError):
        json.dumps(identity)
