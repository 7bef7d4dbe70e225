"""A reader written from docs/tssp.md and what it names alone: it shares no code with the library."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand


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
        plain[part["role"]] = open_chunks(derive(content_key, context), context, sealed)
    return manifest, plain


def derive(content_key: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, info).derive(content_key)


def open_chunks(key: bytes, context: bytes, sealed: bytes) -> bytes:
    """Decrypt by https://c2sp.org/chunked-encryption with SHA-512 and AES-256-GCM."""
    salt, commitment, chunks = sealed[:24], sealed[24:56], sealed[56:]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    derived = HKDFExpand(SHA512(), 32 + 12 + 32, info).derive(key)
    assert derived[44:] == commitment
    cipher, base = AESGCM(derived[:32]), int.from_bytes(derived[32:44], "big")
    size = 16 * 1024 + 16
    assert len(chunks) % size >= 16  # the last one is shorter than the others, so that a missing end shows
    return b"".join(
        cipher.decrypt((base ^ number).to_bytes(12, "big"), chunks[number * size : (number + 1) * size], None)
        for number in range(len(chunks) // size + 1)
    )
