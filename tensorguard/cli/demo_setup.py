"""What `make demo` and `make up` share: the demo's options, its model and its sealed adapter."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError
from tensorguard.models.identity import base_model_identity
from tensorguard.models.smollm2 import prepare_smollm2
from tensorguard.package.publishers import remember_publisher
from tensorguard.package.writer import pack_adapter
from tensorguard.stack.packages import find_adapter
from tensorguard.stack.services import EngineChoice, PackagedAdapter
from tensorguard.stack.settings import StackSettings, load_stack_settings
from tensorguard.store.state import AttestorState

DEMO_ADAPTER = "demo"
DEMO_TENANT = "demo-tenant"
BASE_NAME = "SmolLM2-135M-Instruct"
TRAINED_ADAPTER = Path("examples/demo_adapter/adapter")
# The demonstration compares token by token with a reference in float32; bfloat16 would round differently.
ENGINE_OPTIONS = {"served_model_name": BASE_NAME, "dtype": "float32", "max_model_len": "2048"}


@dataclass(frozen=True, slots=True)
class Demo:
    """The demo's model folder, its trained adapter, the sealed package of it, and hashes of the first two."""

    model: Path
    adapter: Path
    packaged: PackagedAdapter
    model_identity: str
    adapter_identity: str


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the demo's commands. Those of the stack can come from TENSAFE_STACK_... as well."""
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache"), help="models and reference answers")
    parser.add_argument("--adapter", type=Path, default=TRAINED_ADAPTER, help="PEFT adapter of the demo model")
    parser.add_argument("--state-dir", type=Path, help="keys, logs and packages (default: .state)")
    for name in ("port", "attestor-port", "coprocessor-port", "inference-port", "gateway-admin-port"):
        parser.add_argument(f"--{name}", type=int, help="0 takes a free one")
    parser.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        help="mutual TLS between the services (default: loopback without)",
    )
    parser.add_argument("--coprocessor-python", type=Path, help="interpreter of the coprocessor")
    return parser


def prepare(options: argparse.Namespace, console: Console) -> tuple[StackSettings, Demo]:
    """Make what is not there yet: the model, the attestor's keys, the sealed adapter. Raises TenSafeError."""
    settings = load_stack_settings(
        state_dir=options.state_dir,
        port=options.port,
        attestor_port=options.attestor_port,
        coprocessor_port=options.coprocessor_port,
        inference_port=options.inference_port,
        gateway_admin_port=options.gateway_admin_port,
        coprocessor_python=options.coprocessor_python,
        tls=options.tls,
    )
    model = prepare_smollm2(options.cache_dir / "models", lambda line: console.print(line, markup=False))
    adapter: Path = options.adapter
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigurationError(f"there is no adapter in {adapter}: train it with `make demo-adapter`")
    model_identity = _digest(asdict(base_model_identity(model)).values())
    adapter_identity = _digest(
        hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    package = settings.state_dir / "packages" / f"{_digest([model_identity, adapter_identity])[:16]}.tssp"
    try:
        packaged = find_adapter(package, settings.attestor_state)
    except ConfigurationError:
        packaged = _pack(settings, model, adapter, package, console)
    return settings, Demo(model, adapter, packaged, model_identity, adapter_identity)


def engine_of(demo: Demo) -> EngineChoice:
    """The engine that serves the demo."""
    return EngineChoice(str(demo.model), ENGINE_OPTIONS)


def _pack(settings: StackSettings, model: Path, adapter: Path, package: Path, console: Console) -> PackagedAdapter:
    """Seal the adapter as the tenant would with `tensafe pack`, in place of one that cannot be used."""
    state = settings.attestor_state
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing_key = settings.state_dir / "publisher" / "signing-key.pem"
    if not signing_key.exists():
        signing_key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        SigningKeys.generate().write(signing_key)
    keys = SigningKeys.read(signing_key)
    package.unlink(missing_ok=True)
    console.print(f"Sealing the demo adapter into {package}", markup=False)
    with AttestorState.open(state) as attestor:
        pack_adapter(
            adapter,
            package,
            base_model_dir=model,
            tenant=DEMO_TENANT,
            package_id=DEMO_ADAPTER,
            sequence=(attestor.packages.newest_sequence(DEMO_TENANT, DEMO_ADAPTER) or 0) + 1,
            signing_keys=keys,
            key_registrar=attestor.packages.register,
        )
    remember_publisher(state, keys.public)
    return find_adapter(package, state)


def _digest(parts: object) -> str:
    text = os.linesep.join(str(part) for part in parts)  # type: ignore[attr-defined]
    return hashlib.sha256(text.encode()).hexdigest()
