"""The guide's server: one command that serves a base model and private adapters on this machine.

    python -m tensorguard.backends.vllm.server --model M --he-lora-path my_adapter.tssp --port 8000

It starts an attestor, a coprocessor, the inference service and the gateway as processes of their own, waits
until all are healthy, and stops all of them when it ends. It imports no vLLM itself. Every adapter has a model
name of its own; the base model's name is answered through the adapter too where there is one, unless
`--base-name-answers base` says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from tensorguard.backends.vllm.config import TenSafeVLLMConfig
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.errors import ConfigurationError, TenSafeError
from tensorguard.package.publishers import DEFAULT_ATTESTOR_STATE
from tensorguard.stack.command import prepare_command
from tensorguard.stack.embedded import check_together, local_settings, warn_simulated
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.packages import find_adapter
from tensorguard.stack.progress import ConsoleProgress
from tensorguard.stack.services import EngineChoice
from tensorguard.stack.stack import start_stack

# Options that are handed to the engine under the same name.
_ENGINE_OPTIONS = tuple(name for name in EngineOptions.model_fields if name != "model")


def build_parser() -> argparse.ArgumentParser:
    """The command line. Abbreviated and unknown options are errors."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorguard.backends.vllm.server",
        description="Serve a base model and private adapters with OpenAI's protocol.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder of the base model, or its name on the hub")
    parser.add_argument(
        "--he-lora-path", type=Path, required=True, action="append", help="sealed adapter (.tssp); may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (beyond loopback: needs --api-key)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", help="key that clients must send; visible to other users of this machine")
    parser.add_argument("--adapter-name", help="model name of the first adapter (default: the package's id)")
    parser.add_argument(
        "--base-name-answers",
        choices=("adapter", "base"),
        help="what answers requests for the base model's name (default: adapter where there is one, else base)",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        help=f"attestor state in which the package's key is registered (default: {DEFAULT_ATTESTOR_STATE})",
    )
    parser.add_argument("--publisher-key", type=Path, action="append", default=[], help="public key of the signer")
    parser.add_argument(
        "--require-attestation",
        action=argparse.BooleanOptionalAction,
        help="refuse simulated evidence, the only kind there is when one command starts everything "
        "(default: permitted, with a warning)",
    )
    engine = parser.add_argument_group("engine (as vLLM names them)")
    for name in _ENGINE_OPTIONS:
        field, flag = EngineOptions.model_fields[name], f"--{name.replace('_', '-')}"
        description = (field.description or "").replace("%", "%%")
        if field.annotation in (bool, bool | None):
            engine.add_argument(flag, action=argparse.BooleanOptionalAction, help=description)
        else:
            engine.add_argument(flag, help=description)
    return parser


def check(options: argparse.Namespace) -> tuple[TenSafeVLLMConfig, dict[str, object]]:
    """The configuration these options mean. Raises ConfigurationError."""
    given = {name: getattr(options, name) for name in _ENGINE_OPTIONS if getattr(options, name) is not None}
    config = TenSafeVLLMConfig(
        model=options.model,
        tssp_package_path=options.he_lora_path[0],
        adapters=tuple(options.he_lora_path[1:]),
        enable_he_lora=True,
        require_attestation=options.require_attestation,
        adapter_name=options.adapter_name,
        base_name_answers=options.base_name_answers or ("base" if options.he_lora_path[1:] else "adapter"),
        publisher_keys=tuple(options.publisher_key),
        **given,
    )
    given = {name: getattr(config, name) for name in given}
    if not config.simulated_evidence_permitted:
        raise ConfigurationError(
            "--require-attestation needs TEE hardware and a real attestor; this command starts its own with "
            "simulated evidence. Start the services one by one for that (docs/quickstart.md)"
        )
    return config, given


def run(options: argparse.Namespace, console: Console) -> NoReturn:
    """Start everything and serve until a signal. Raises TenSafeError."""
    config, given = check(options)
    settings = local_settings(
        options.state_dir,
        host=options.host,
        port=options.port,
        attestor_port=0,
        coprocessor_port=0,
        inference_port=0,
        gateway_admin_port=0,
        reflection=False,
    )
    names = [config.adapter_name, *(None for _ in options.he_lora_path[1:])]
    adapters = [
        find_adapter(path, settings.attestor_state, name, config.publisher_keys, config.model)
        for path, name in zip(options.he_lora_path, names, strict=True)
    ]
    check_together(adapters)
    warn_simulated()
    engine = EngineChoice(
        config.model,
        {
            **{name: str(value) for name, value in given.items()},
            "base_name_answers": config.base_name_answers,
        },
    )
    with ConsoleProgress(console) as progress, Launcher(settings.logs, progress) as launcher:
        endpoints = start_stack(launcher, settings, adapters, engine, options.api_key)
        console.print(f"Serving on {endpoints.base_url}", highlight=False)
        answers = "the adapter" if config.base_name_answers == "adapter" else "the base model"
        console.print(f"  model {config.base_name!r} is answered by {answers}", highlight=False)
        for adapter in adapters:
            console.print(f"  model {adapter.name!r} is answered by the adapter", highlight=False)
        console.print("  evidence: [bold red]SIMULATED[/] (no hardware vouches for any part)")
        console.print(f"  authentication: {'API key' if options.api_key else 'off'}", highlight=False)
        launcher.wait()
    raise AssertionError("wait does not return")


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 after a signal, 1 with one clear error, 2 for a wrong option."""
    options = build_parser().parse_args(arguments)
    prepare_command()
    try:
        run(options, Console(stderr=True))
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
