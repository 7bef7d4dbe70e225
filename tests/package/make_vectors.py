"""Write tests/package/vectors: `python -m tests.package.make_vectors`.

Signatures, salts and bases are drawn at random, so a package that is there stays as it is, bytes and all, and only what
is missing is made. What a reader meets on its way through each package is written anew, from the bytes of the
package and its content key alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.package.writer import pack_adapter
from tests.package.independent_reader import derive, independent_reader
from tests.support.adapters import adapter_config, adapter_tensors, write_adapter, write_base_model

FOLDER = Path(__file__).parent / "vectors"
PACKAGES: dict[str, Literal["factored", "full"]] = {"tiny": "factored", "tiny-full": "full"}
ENVELOPE_AFTER_MANIFEST = 32 + 64 + 3309
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
"""S plus this satisfies a signature's equation, too; RFC 8032 (5.1.7) wants S below it."""


def make(name: str, mode: Literal["factored", "full"]) -> None:
    """Seal a small adapter (rank 2, q and k of one layer) with keys of its own, for a century."""
    projections = ("q_proj", "k_proj")
    keys, registered = SigningKeys.generate(), {}
    with TemporaryDirectory() as folder:
        adapter = write_adapter(
            Path(folder) / "adapter",
            adapter_tensors(projections, rank=2, layers=1),
            adapter_config(projections, rank=2, lora_alpha=3),
        )
        pack_adapter(
            adapter,
            FOLDER / f"{name}.tssp",
            base_model_dir=write_base_model(Path(folder) / "tiny-model", num_hidden_layers=1),
            tenant="acme",
            package_id=name,
            sequence=3,
            signing_keys=keys,
            key_registrar=lambda **release: registered.update(release),
            mode=mode,
            life_seconds=100 * 365 * 24 * 3600,
        )
    (FOLDER / f"{name}.pub.pem").write_bytes(keys.public.to_pem())
    write(name, {"content_key": registered["content_key"].hex()})


def describe(content: bytes, content_key: bytes, plaintexts: dict[str, bytes]) -> dict[str, Any]:
    """Every intermediate value of docs/tssp.md. `plaintexts`: of the parts, by role."""
    length = int.from_bytes(content[8:12], "little")
    manifest_bytes = content[16 : 16 + length]
    manifest = json.loads(manifest_bytes)
    kind = "application/vnd.tensafe.tssp.manifest.v1+json"
    signed = f"DSSEv1 {len(kind)} {kind} {length} ".encode() + manifest_bytes
    parts = {}
    for part in manifest["parts"]:
        bound = {"format": "tssp/v1/part", "name": part["name"], "role": part["role"]}
        bound |= {name: manifest[name] for name in ("key_id", "package_id", "sequence", "tenant")}
        context = json.dumps(bound, sort_keys=True, separators=(",", ":"))
        parts[part["role"]] = {
            "offset_in_file": 16 + length + ENVELOPE_AFTER_MANIFEST + part["offset"],
            "context": context,
            "key": derive(content_key, context.encode()).hex(),
            "plaintext_size": len(plaintexts[part["role"]]),
            "plaintext_sha256": hashlib.sha256(plaintexts[part["role"]]).hexdigest(),
        }
    return {
        "content_key": content_key.hex(),
        "key_id": derive(content_key, b"tssp/v1/key-id")[:16].hex(),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "manifest_sha256": hashlib.sha256(manifest_bytes).hexdigest(),
        "signed_sha256": hashlib.sha256(signed).hexdigest(),
        "signer": content[16 + length : 48 + length].hex(),
        "parts": parts,
    }


def refused(content: bytes) -> list[dict[str, Any]]:
    """Edits of a package that a reader refuses: bytes put at an offset, or the length it is cut to."""
    length = int.from_bytes(content[8:12], "little")
    signer, parts = 16 + length, 16 + length + ENVELOPE_AFTER_MANIFEST
    ed25519, mldsa, end = signer + 32, signer + 96, len(content)
    budget = content.index(b'"token_budget":') + len(b'"token_budget":')
    second_form = int.from_bytes(content[ed25519 + 32 : mldsa], "little") + ED25519_ORDER

    def put(what: str, reason: str, offset: int, data: bytes) -> dict[str, Any]:
        return {"what": what, "reason": reason, "offset": offset, "bytes": data.hex()}

    def flip(what: str, reason: str, offset: int) -> dict[str, Any]:
        return put(what, reason, offset, bytes([content[offset] ^ 1]))

    def cut(what: str, reason: str, size: int) -> dict[str, Any]:
        return {"what": what, "reason": reason, "length": size}

    return [
        put("another magic", "package", 0, b"TSSQ"),
        put("version 2", "package", 4, b"\x02"),
        put("a flag", "package", 6, b"\x01"),
        put("a manifest length of 2^32 - 1", "package", 8, b"\xff" * 4),
        flip("another length of the signatures", "package", 12),
        flip("another token budget", "package_tampered", budget),
        flip("another signer", "package", signer),
        put("no Ed25519 signature", "package_tampered", ed25519, bytes(64)),
        put(
            "second form of the Ed25519 signature", "package_tampered", ed25519 + 32, second_form.to_bytes(32, "little")
        ),
        put("no ML-DSA-65 signature", "package_tampered", mldsa, bytes(3309)),
        flip("the first byte of the first part", "package_tampered", parts),
        flip("the last byte", "package_tampered", end - 1),
        put("a byte more", "package_tampered", end, b"\0"),
        cut("a byte less", "package_tampered", end - 1),
        cut("no parts", "package_tampered", parts),
        cut("half a signature", "package", mldsa + 1000),
        cut("half a header", "package", 8),
    ]


def write(name: str, content: Any) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    for name, mode in PACKAGES.items():
        if not (FOLDER / f"{name}.tssp").exists():
            make(name, mode)
        content = (FOLDER / f"{name}.tssp").read_bytes()
        key = bytes.fromhex(json.loads((FOLDER / f"{name}.json").read_text())["content_key"])
        _, plaintexts = independent_reader(content, (FOLDER / f"{name}.pub.pem").read_bytes(), key)
        write(name, describe(content, key, plaintexts))
    write("refused", {"package": "tiny", "edits": refused((FOLDER / "tiny.tssp").read_bytes())})


if __name__ == "__main__":
    main()
