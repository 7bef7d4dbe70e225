"""Dual signatures: both must verify, over exactly the declared type and payload."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from tensorguard.crypto.signatures import (
    ED25519_SIGNATURE_BYTES,
    MLDSA65_SIGNATURE_BYTES,
    SigningKeys,
    VerifyingKeys,
    pre_authentication_encoding,
)
from tensorguard.errors import ConfigurationError, PackageTamperedError

TYPE = "application/vnd.test"


@pytest.fixture(scope="module")
def keys() -> SigningKeys:
    return SigningKeys.generate()


def test_dsse_pre_authentication_encoding() -> None:
    # The example of the DSSE protocol document.
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_verifies_what_was_signed(keys: SigningKeys) -> None:
    signature = keys.sign(TYPE, b"payload")
    assert (len(signature.ed25519), len(signature.mldsa65)) == (
        ED25519_SIGNATURE_BYTES,
        MLDSA65_SIGNATURE_BYTES,
    )
    keys.public.verify(TYPE, b"payload", signature)


def test_refuses_another_payload_type_or_signer(keys: SigningKeys) -> None:
    signature = keys.sign(TYPE, b"payload")
    for public, kind, payload in (
        (keys.public, TYPE, b"payloae"),
        (keys.public, TYPE + "x", b"payload"),
        (SigningKeys.generate().public, TYPE, b"payload"),
    ):
        with pytest.raises(PackageTamperedError):
            public.verify(kind, payload, signature)


@pytest.mark.parametrize("name", ["ed25519", "mldsa65"])
def test_one_signature_is_not_enough(keys: SigningKeys, name: str) -> None:
    signature = keys.sign(TYPE, b"payload")
    forged = bytes([getattr(signature, name)[0] ^ 1]) + getattr(signature, name)[1:]
    for value in (forged, b"", getattr(SigningKeys.generate().sign(TYPE, b"payload"), name)):
        with pytest.raises(PackageTamperedError):
            keys.public.verify(TYPE, b"payload", dataclasses.replace(signature, **{name: value}))


def test_key_files(keys: SigningKeys, tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    keys.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = SigningKeys.read(path)
    assert again.public.key_id == keys.public.key_id
    assert VerifyingKeys.from_pem(keys.public.to_pem()).key_id == keys.public.key_id
    with pytest.raises(ConfigurationError, match="exists already"):
        keys.write(path)
    assert list(tmp_path.iterdir()) == [path]
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        SigningKeys.read(path)


def test_refuses_files_that_hold_something_else(keys: SigningKeys, tmp_path: Path) -> None:
    public = keys.public.to_pem()
    first, second = public.split(b"-----END PUBLIC KEY-----\n")[:2]
    end = b"-----END PUBLIC KEY-----\n"
    for number, data in enumerate(
        (
            b"",
            b"junk",
            public + public,
            first + end,
            second + end + first + end,
            public + b"\njunk",
            bytes(100_000),
        )
    ):
        path = tmp_path / f"{number}.pem"
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError):
            VerifyingKeys.read(path)
        with pytest.raises(ConfigurationError):
            SigningKeys.read(path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        VerifyingKeys.read(tmp_path / "absent.pem")


def test_private_keys_are_not_shown(keys: SigningKeys) -> None:
    assert "mldsa65=" not in repr(keys)
