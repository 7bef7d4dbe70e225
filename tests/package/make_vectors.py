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


def write(name: str, content: dict[str, Any]) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    for name, mode in PACKAGES.items():
        if not (FOLDER / f"{name}.tssp").exists():
            make(name, mode)
        content = (FOLDER / f"{name}.tssp").read_bytes()
        key = bytes.fromhex(json.loads((FOLDER / f"{name}.json").read_text())["content_key"])
        _, plaintexts = independent_reader(content, (FOLDER / f"{name}.pub.pem").read_bytes(), key)
        write(name, describe(content, key, plaintexts))


if __name__ == "__main__":
    main()
