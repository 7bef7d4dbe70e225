"""A reader written from docs/tssp.md alone, which shares no code with the library."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


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
