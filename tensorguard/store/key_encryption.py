"""Key-encryption keys: what the attestor's secrets are wrapped under before they reach its database.

A key is named by one word, as in TENSAFE_ATTESTOR_KEY_ENCRYPTION_KEY:

    file:PATH                  32 bytes in a file of mode 0600
    env:NAME                   32 bytes, base64, in the environment variable NAME
    vault:https://HOST/MOUNT/KEY   a key of HashiCorp Vault's transit engine (`tensorguard.store.vault`)
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tensorguard.crypto.files import read_secret_file, write_secret_file
from tensorguard.errors import ConfigurationError, PackageKeyError

KEY_BYTES = 32
_NONCE_BYTES = 12


class KeyEncryptionKey(Protocol):
    """Wraps secrets of at most a few KiB. `context` is authenticated: what is moved elsewhere does not open."""

    @property
    def id(self) -> str:
        """Names the key without telling it; kept in the database to notice a wrong one."""

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """Raises UnavailableError when the key cannot be used now."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The inverse. Raises PackageKeyError when `wrapped` was not made by `wrap` of this key and context."""


class LocalKey:
    """A key in this process's memory: AES-256-GCM with a random nonce."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigurationError(f"a key-encryption key has {KEY_BYTES} bytes, not {len(key)}")
        self._cipher = AESGCM(key)
        self.id = "local:" + hashlib.sha256(b"tssp-kek-id/v1\x00" + key).hexdigest()[:32]

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        try:
            return self._cipher.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError):
            raise PackageKeyError("a wrapped key does not open: the database was edited") from None


def open_key_encryption_key(name: str, *, create: bool = False) -> KeyEncryptionKey:
    """The key that `name` stands for. `create`: make the file of a `file:` key that is not there yet.

    Raises ConfigurationError when it is missing, malformed or readable by others.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "file" and rest:
        return LocalKey(_read(Path(rest).expanduser(), create=create))
    if scheme == "env" and rest:
        return LocalKey(_from_environment(rest))
    if scheme == "vault" and rest:
        from tensorguard.store.vault import open_vault_key  # its HTTP client is needed for this kind only

        return open_vault_key(rest)
    raise ConfigurationError(
        f"{scheme!r:.20} is not a kind of key-encryption key: write file:PATH, env:NAME or vault:https://HOST/MOUNT/KEY"
    )


def _read(path: Path, *, create: bool) -> bytes:
    if create and not path.exists():
        with contextlib.suppress(ConfigurationError):  # another process may have been faster
            write_secret_file(path, os.urandom(KEY_BYTES))
    if not path.exists():
        raise ConfigurationError(f"{path} is missing, without which no key in the database opens; restore it")
    return read_secret_file(path)


def _from_environment(name: str) -> bytes:
    try:
        return base64.b64decode(os.environ[name], validate=True)
    except KeyError:
        raise ConfigurationError(
            f"the environment variable {name}, which holds the key-encryption key, is not set"
        ) from None
    except (binascii.Error, ValueError):
        raise ConfigurationError(f"the environment variable {name} is not base64") from None
