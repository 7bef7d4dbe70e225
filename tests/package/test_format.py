"""The bytes of version 1 stay as they are: a stored package is read by the library, and by a reader written from
docs/tssp.md alone, which shares no code with it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from safetensors.numpy import load

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.package.reader import open_manifest, read_adapter
from tests.package.conftest import Packed

VECTORS = Path(__file__).parent / "vectors"
PACKAGE = VECTORS / "tiny.tssp"
EXPECTED = json.loads((VECTORS / "tiny.json").read_text())


def independent_reader(data: bytes, pem: bytes, content_key: bytes) -> tuple[Any, dict[str, bytes]]:
    """Manifest and plaintexts of a package, as docs/tssp.md describes."""
    magic, version, flags, length, signatures = struct.unpack_from("<4sHHII", data)
    assert (magic, version, flags, signatures) == (b"TSSP", 1, 0, 3405)
    manifest_bytes = data[16 : 16 + length]
    signer, ed25519, mldsa = (
        data[16 + length : 48 + length],
        data[48 + length : 112 + length],
        data[112 + length : 3421 + length],
    )
    end = b"-----END PUBLIC KEY-----\n"
    keys: list[Any] = [serialization.load_pem_public_key(block + end) for block in pem.split(end)[:2]]
    assert hashlib.sha256(b"".join(key.public_bytes_raw() for key in keys)).digest() == signer
    kind = b"application/vnd.tensafe.tssp.manifest.v1+json"
    message = b"DSSEv1 45 " + kind + b" " + str(length).encode() + b" " + manifest_bytes
    keys[0].verify(ed25519, message)
    keys[1].verify(mldsa, message)
    manifest = json.loads(manifest_bytes)
    assert derive(content_key, b"tssp/v1/key-id")[:16].hex() == manifest["key_id"]
    plain = {}
    for part in manifest["parts"]:
        start = 3421 + length + part["offset"]
        sealed = data[start : start + part["size"]]
        assert hashlib.sha256(sealed).hexdigest() == part["sha256"]
        context = (
            f'{{"format":"tssp/v1/part","key_id":"{manifest["key_id"]}","name":"{part["name"]}",'
            f'"package_id":"{manifest["package_id"]}","role":"{part["role"]}",'
            f'"sequence":{manifest["sequence"]},"tenant":"{manifest["tenant"]}"}}'
        ).encode()
        decryptor = Cobblestone256Decryptor(derive(content_key, context), context)
        plain[part["role"]] = decryptor.update(sealed) + decryptor.finalize()
    return manifest, plain


def derive(content_key: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, info).derive(content_key)


def test_the_stored_package_reads_as_ever() -> None:
    verified = open_manifest(PACKAGE, VerifyingKeys.read(VECTORS / "tiny.pub.pem"))
    assert verified.digest == EXPECTED["manifest_sha256"]
    assert verified.signer == EXPECTED["signer"]
    contents = read_adapter(PACKAGE, verified, bytes.fromhex(EXPECTED["content_key"]), now=verified.manifest.created)
    (group,) = contents.groups
    assert hashlib.sha256(group.integers.astype("<i4").tobytes()).hexdigest() == EXPECTED["weights_sha256"]
    assert hashlib.sha256(contents.u).hexdigest() == EXPECTED["basis_sha256"]


def test_the_stored_package_reads_as_the_document_says() -> None:
    pem = (VECTORS / "tiny.pub.pem").read_bytes()
    manifest, plain = independent_reader(PACKAGE.read_bytes(), pem, bytes.fromhex(EXPECTED["content_key"]))
    (group,) = manifest["moai"]["groups"]
    weights, basis = load(plain["weights"]), load(plain["basis"])
    assert weights["layer.0.qkv"].shape == (4, 48)
    assert hashlib.sha256(weights["layer.0.qkv"].astype("<i4").tobytes()).hexdigest() == EXPECTED["weights_sha256"]
    assert {name: u.shape for name, u in basis.items()} == {
        f"layer.0.{info['name']}": (info["d_out"], info["rank"]) for info in group["projections"]
    }
    assert float(group["norm_bound"]) == 2**12 * np.sqrt(48 * 2)
    assert (manifest["peft"]["alpha"], manifest["release_policy"]["id"]) == ("3.0", "example")


def test_a_new_package_reads_as_the_document_says(packed: Packed) -> None:
    manifest, plain = independent_reader(packed.path.read_bytes(), packed.keys.public.to_pem(), packed.content_key)
    assert manifest["package_id"] == "law-style"
    assert set(load(plain["weights"])) == {"layer.0.qkv", "layer.0.down", "layer.1.qkv", "layer.1.down"}
