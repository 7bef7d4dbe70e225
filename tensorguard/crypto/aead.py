"""Encryption of package parts: Cobblestone-256, a chunked AEAD (C2SP chunked-encryption), one key per part.

A part's key is HKDF-SHA256 of the content key, its `info` the canonical context of the part; the same
context is given to Cobblestone. Authentication is per 16 KiB chunk, so plaintext is handed out only after
the last one has verified.
"""

from __future__ import annotations

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tensorguard.errors import InvalidInputError

KEY_BYTES = 32
# Of a Cobblestone ciphertext: fixed header, then a tag for each begun chunk.
CHUNK_BYTES = 16 * 1024


def derive_key(secret: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt from a uniformly random 32-byte secret."""
    if len(secret) != KEY_BYTES:
        raise InvalidInputError(f"a content key has {KEY_BYTES} bytes, not {len(secret)}")
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def seal_part(content_key: bytes, context: bytes, plaintext: bytes) -> bytes:
    """Encrypt a part. `context` must differ between any two parts that share the content key."""
    encryptor = Cobblestone256Encryptor(derive_key(content_key, context), context)
    return encryptor.update(plaintext) + encryptor.finalize()


def open_part(content_key: bytes, context: bytes, ciphertext: bytes) -> bytes:
    """Decrypt a whole part.

    Raises InvalidInputError when key, context or any byte differ, or the end is missing; nothing is returned
    then.
    """
    decryptor = Cobblestone256Decryptor(derive_key(content_key, context), context)
    try:
        return decryptor.update(ciphertext) + decryptor.finalize()
    except (InvalidTag, ValueError):
        raise InvalidInputError("the part does not open under this key and context") from None
