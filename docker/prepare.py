"""Run once by docker-compose.yml: what a tenant and an operator would each do by hand before the services start.

Fills the volumes with the demo model (operator), the attestor's development state and the sealed demo adapter
(tenant), and what the parties exchange: the publisher's public key, the attestor's thumbprint, the simulated
root, the API key's hash. A second run keeps what is there and takes over a new API
key; it may happen while services run, as some compose implementations do it.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.evidence.development import initialise_development_state
from tensorguard.models.smollm2 import prepare_smollm2
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState

ATTESTOR, PACKAGES, TRUST, MODELS, GATEWAY = map(Path, ("/attestor", "/packages", "/trust", "/models", "/gateway"))
ADAPTER = Path("/app/examples/demo_adapter/adapter")
TENANT, NAME = "demo-tenant", "demo"


def say(text: str) -> None:
    print(f"prepare: {text}", flush=True)


def write(path: Path, data: bytes) -> None:
    """Readable by its owner only; all containers run as the same user. Never half there: others may be reading."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_bytes(data)
    fresh.replace(path)


def seal(model: Path) -> str:
    """Pack the demo adapter unless it is there; returns the manifest digest."""
    package, digest = PACKAGES / "demo.tssp", PACKAGES / "demo.digest"
    if package.exists() and digest.exists():
        return digest.read_text()
    signing_key = ATTESTOR / "publisher.pem"
    if not signing_key.exists():
        SigningKeys.generate().write(signing_key)
    keys, registry = SigningKeys.read(signing_key), AttestorState.open(ATTESTOR).packages
    say("sealing the demo adapter")
    package.unlink(missing_ok=True)
    verified = pack_adapter(
        ADAPTER,
        package,
        base_model_dir=model,
        tenant=TENANT,
        package_id=NAME,
        sequence=(registry.newest_sequence(TENANT, NAME) or 0) + 1,
        signing_keys=keys,
        key_registrar=registry.register,
    )
    write(TRUST / "publisher.pub.pem", keys.public.to_pem())
    digest.write_text(verified.digest)
    return verified.digest


def main() -> None:
    model = prepare_smollm2(MODELS, say)
    state = initialise_development_state(ATTESTOR, TENANT)
    say("the attestor's policy accepts SIMULATED evidence: this stack is for development")
    digest = seal(model)
    write(TRUST / "simulated-root.pem", state.simulated_root_key.read_bytes())
    write(TRUST / "attestor-thumbprint", state.attestor_thumbprint.encode())
    connection = {
        "name": NAME,
        "coprocessor_endpoint": "he_lora:7402",
        "attestor_endpoint": "attestor:7401",
        "attestor_thumbprint": state.attestor_thumbprint,
        "tenant": TENANT,
        "publisher_keys": [str(TRUST / "publisher.pub.pem")],
        "expected_digest": digest,
    }
    setting = f"export TENSAFE_INFERENCE_ADAPTERS='{json.dumps([connection])}'\n"
    write(TRUST / "inference.env", setting.encode())
    secret = GATEWAY / "inference-secret"
    if not secret.exists():
        write(secret, secrets.token_hex(32).encode())
    keys_file = GATEWAY / "keys.json.new"
    keys_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "services.gateway.keys", "import", "--plain-key"]
    command += ["--file", str(keys_file), "--tenant", TENANT]
    # Through standard input: arguments can be seen by others.
    subprocess.run(command, input=os.environ["TENSAFE_API_KEY"] + "\n", text=True, check=True)
    keys_file.replace(GATEWAY / "keys.json")
    say("done")


if __name__ == "__main__":
    main()
