"""A key-encryption key in HashiCorp Vault's transit engine, by its HTTP API (v1).

https://developer.hashicorp.com/vault/api-docs/secret/transit: `encrypt` and `decrypt` with `associated_data`, which
binds a ciphertext to its context (Vault knows it from 1.13 on; an older one ignores it, and is refused); the key must
be of type aes256-gcm96 or chacha20-poly1305. The key never leaves Vault. The token comes from VAULT_TOKEN or, as `vault
agent` writes it, the file that VAULT_TOKEN_FILE names.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tensorguard.crypto.files import read_secret_file
from tensorguard.errors import ConfigurationError, PackageKeyError, UnavailableError

_TIMEOUT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 64 * 1024
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class VaultKey:
    """One transit key. Every use is a request to Vault."""

    def __init__(self, address: str, mount: str, key: str, token: str, *, namespace: str = "") -> None:
        """`address`: scheme, host and port. `namespace`: of Vault Enterprise."""
        self.id = f"vault:{mount}/{key}"
        self._mount, self._key = mount, key
        self._binds = False
        headers = {"X-Vault-Token": token, "X-Vault-Request": "true"}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        self._client = httpx.Client(base_url=f"{address}/v1/", headers=headers, timeout=_TIMEOUT_SECONDS)

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        ciphertext = self._call(
            "encrypt", {"plaintext": _encode(secret), "associated_data": _encode(context)}, "ciphertext"
        )
        wrapped = ciphertext.encode()
        if not self._binds:
            self._check_binding(wrapped, context)
            self._binds = True
        return wrapped

    def _check_binding(self, wrapped: bytes, context: bytes) -> None:
        """Raises ConfigurationError when a ciphertext opens in another context than its own."""
        try:
            self.unwrap(wrapped, context + b"?")
        except PackageKeyError:
            return
        raise ConfigurationError("this Vault ignores associated_data, without which keys could be exchanged: use 1.13")

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        if not wrapped.startswith(b"vault:") or not wrapped.isascii():
            raise PackageKeyError("a wrapped key does not open: it was not wrapped by Vault")
        answer = self._call(
            "decrypt", {"ciphertext": wrapped.decode(), "associated_data": _encode(context)}, "plaintext"
        )
        return base64.b64decode(answer)

    def _call(self, operation: str, body: dict[str, str], field: str) -> str:
        try:
            response = self._client.post(f"{self._mount}/{operation}/{self._key}", json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"Vault does not answer ({type(error).__name__}); see that it runs and is unsealed"
            ) from None
        if response.status_code == httpx.codes.BAD_REQUEST and operation == "decrypt":
            raise PackageKeyError(
                "a wrapped key does not open in Vault: the database was edited, or the key is another one"
            )
        if response.status_code in (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND, httpx.codes.BAD_REQUEST):
            raise ConfigurationError(
                f"Vault refuses to {operation} with {self._mount}/{self._key} (HTTP {response.status_code}): check the "
                "token's policy, the mount and that the key is of type aes256-gcm96"
            )
        if response.status_code != httpx.codes.OK:
            raise UnavailableError(
                f"Vault answered {operation} with HTTP {response.status_code}; see that it is unsealed"
            )
        if len(response.content) > _MAX_ANSWER_BYTES:
            raise UnavailableError("Vault's answer is too large")
        try:
            value = response.json()["data"][field]
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise UnavailableError(f"Vault's answer has no {field}")
        return value


def open_vault_key(location: str) -> VaultKey:
    """The key at https://HOST[:PORT]/MOUNT/KEY, with the token of the environment. Raises ConfigurationError."""
    parts = urlsplit(location)
    path = parts.path.strip("/").rsplit("/", 1)
    if len(path) != 2 or not all(path) or not parts.hostname or parts.query or parts.username:
        raise ConfigurationError("a Vault key is written vault:https://HOST[:PORT]/MOUNT/KEY")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ConfigurationError("Vault must be reached by https:// (http:// on loopback only)")
    return VaultKey(
        f"{parts.scheme}://{parts.netloc}", path[0], path[1], _token(), namespace=os.environ.get("VAULT_NAMESPACE", "")
    )


def _token() -> str:
    if token := os.environ.get("VAULT_TOKEN"):
        return token
    if path := os.environ.get("VAULT_TOKEN_FILE"):
        return read_secret_file(Path(path)).decode("ascii", "replace").strip()
    raise ConfigurationError("no Vault token: set VAULT_TOKEN, or VAULT_TOKEN_FILE to a file of mode 0600")


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
