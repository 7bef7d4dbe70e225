"""The envelope and manifest of a package, which anyone can hand to a coprocessor."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.target import Target
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import TenSafeError
from tensorguard.package.contract import check_contract
from tensorguard.package.envelope import parse_envelope, read_envelope
from tensorguard.package.manifest import Manifest, parse_manifest
from tensorguard.package.writer import pack_adapter
from tests.support.adapters import adapter_config, adapter_tensors, write_adapter, write_base_model

# JSON of small numbers becomes objects of some hundred bytes.
FACTOR, ALLOWANCE = 128, 1024 * 1024


def manifest_target() -> Target:
    """Even first bytes edit the envelope, odd ones the manifest in it (parsing follows the signatures)."""
    envelope, manifest = _sealed()

    def run(data: bytes) -> None:
        if not data:
            return
        inner = bool(data[0] & 1)
        message = message_from(data[1:], [manifest if inner else envelope])
        with bounded_memory(len(message), FACTOR, ALLOWANCE):
            try:
                parsed = parse_manifest(message) if inner else _read(message)
                check_contract(parsed)
            except TenSafeError:
                return
            # What is accepted has one form only.
            assert parse_manifest(parsed.to_bytes()) == parsed

    return Target("manifest", [b"\0\0", b"\1\0", b"\0\1", b'\1\1{"a":1}'], run)


def _read(message: bytes) -> Manifest:
    return parse_envelope(read_envelope(io.BytesIO(message))).manifest


def _sealed() -> tuple[bytes, bytes]:
    """Envelope and manifest of a small package."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        projections = ("q_proj", "v_proj")
        package = pack_adapter(
            write_adapter(folder / "adapter", adapter_tensors(projections), adapter_config(projections)),
            folder / "adapter.tssp",
            base_model_dir=write_base_model(folder / "model"),
            tenant="tenant",
            package_id="tiny",
            sequence=1,
            signing_keys=SigningKeys.generate(),
            key_registrar=lambda *_, **__: None,
        )
    return package.envelope, package.manifest.to_bytes()
