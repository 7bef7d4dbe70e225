"""A small HTTP server that answers as HashiCorp Vault's transit engine does (API v1), for one key."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


@dataclass
class FakeVault:
    """Its address, and what a test may change."""

    address: str = ""
    token: str = "s.root"
    status: int | None = None
    """Answered instead of the truth."""
    body: bytes | None = None
    ignores_associated_data: bool = False
    """As Vault did before 1.13."""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    key: AESGCM = field(default_factory=lambda: AESGCM(os.urandom(32)))


@contextmanager
def running_vault() -> Iterator[FakeVault]:
    vault = FakeVault()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            vault.requests.append((self.path, body))
            status, answer = _answer(vault, self.path, self.headers.get("X-Vault-Token"), body)
            data = vault.body if vault.body is not None else json.dumps(answer).encode()
            self.send_response(vault.status or status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vault.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield vault
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(vault: FakeVault, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if token != vault.token:
        return 403, {"errors": ["permission denied"]}
    associated = b"" if vault.ignores_associated_data else base64.b64decode(body["associated_data"])
    if path == "/v1/transit/encrypt/tensafe":
        nonce = os.urandom(12)
        sealed = nonce + vault.key.encrypt(nonce, base64.b64decode(body["plaintext"]), associated)
        return 200, {"data": {"ciphertext": "vault:v1:" + base64.b64encode(sealed).decode(), "key_version": 1}}
    if path == "/v1/transit/decrypt/tensafe":
        try:
            sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
            plain = vault.key.decrypt(sealed[:12], sealed[12:], associated)
        except (InvalidTag, ValueError):
            return 400, {"errors": ["cipher: message authentication failed"]}
        return 200, {"data": {"plaintext": base64.b64encode(plain).decode()}}
    return 404, {"errors": ["no handler for route"]}
