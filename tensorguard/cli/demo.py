"""`make demo`: base model, private adapter and plaintext reference side by side, through the OpenAI client.

Everything is real: SmolLM2's weights, a trained LoRA, sealed package, four processes, ciphertexts. Only the
evidence is of kind `simulated`, as the machine has no TEE. Answers go to standard output, progress to
standard error; the last line on standard output is one JSON object. The exit code is 0 only if every adapted
answer equals the plaintext reference token by token and differs from the base model's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER, Demo, add_options, engine_of, prepare
from tensorguard.errors import ConfigurationError, TenSafeError, UnavailableError
from tensorguard.evidence.enrolment import EnrolledService
from tensorguard.rpc.certificates import ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2, he_lora_pb2_grpc
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2, inference_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls
from tensorguard.stack.command import prepare_command
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.progress import ConsoleProgress
from tensorguard.stack.settings import StackSettings
from tensorguard.stack.stack import Endpoints, start_stack

PROMPTS = (
    "Tell me about the sea.",
    "How do I make a good cup of tea?",
    "Explain homomorphic encryption in simple words.",
)
STREAMED = 1  # index of the prompt that is asked for as a stream
MAX_TOKENS = 64
REFERENCE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer."""

    text: str
    token_ids: list[int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Adapted answer and plaintext reference of one prompt."""

    identical: bool
    first_difference: int | None
    logit_gap: float | None
    """Highest minus second-highest logit of the reference at the first difference."""


def ask(client: Any, model: str, prompt: str, stream: bool) -> Answer:
    """Ask through the OpenAI client, greedily. Token ids come with vLLM's `return_token_ids`."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    }
    begun = time.monotonic()
    if not stream:
        choice = client.chat.completions.create(**request).choices[0]
        return Answer(choice.message.content or "", list(choice.token_ids), time.monotonic() - begun)
    text = ""
    token_ids: list[int] = []
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            token_ids += getattr(choice, "token_ids", None) or []
    return Answer(text, token_ids, time.monotonic() - begun)


def reference_answers(demo: Demo, cache: Path, console: Console) -> list[dict[str, Any]]:
    """The plaintext LoRA's answers: unmodified PEFT in float32, in a process of its own. Kept in `cache`."""
    prompts = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    question = [REFERENCE_VERSION, demo.model_identity, demo.adapter_identity, prompts, MAX_TOKENS]
    file = cache / f"{hashlib.sha256(json.dumps(question).encode()).hexdigest()}.json"
    if not file.exists():
        console.print("Computing the plaintext reference (unmodified PEFT, float32), once")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            (Path(folder) / "prompts.json").write_text(json.dumps(prompts))
            command = [sys.executable, "-m", "tensorguard.models.reference", "--model", str(demo.model)]
            command += ["--adapter", str(demo.adapter), "--prompts", f"{folder}/prompts.json"]
            command += ["--max-tokens", str(MAX_TOKENS), "--json", f"{folder}/answers.json"]
            # Idle threads sleep instead of spinning: several times faster on a machine that is busy.
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=False)
            if done.returncode != 0:
                raise ConfigurationError("the plaintext reference failed; the lines above say why")
            (Path(folder) / "answers.json").replace(file)
    answers: list[dict[str, Any]] = json.loads(file.read_text())
    return answers


def compare(answer: Answer, reference: dict[str, Any]) -> Comparison:
    """Token by token."""
    expected = reference["token_ids"]
    if answer.token_ids == expected:
        return Comparison(True, None, None)
    pairs = zip(answer.token_ids, expected, strict=False)
    shorter = min(len(answer.token_ids), len(expected))
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
    gap = reference["gaps"][first] if first < len(reference["gaps"]) else None
    return Comparison(False, first, gap)


def service_status(endpoints: Endpoints) -> tuple[Any, Any]:
    """(inference status, coprocessor status)."""
    identity = None
    if endpoints.authority:  # the services want a certificate, and this command owns the gateway's
        files = Path(endpoints.authority), Path(endpoints.gateway_tls_dir)
        identity = EnrolledService(ServiceName("gateway"), endpoints.attestor, *files).identity()

    def tls(role: str) -> ChannelTls | None:
        return None if identity is None else ChannelTls(identity.authority, ServiceName(role), identity)

    try:
        with open_channel(endpoints.inference, tls=tls("inference")) as channel:
            inference = inference_pb2_grpc.InferenceServiceStub(channel).GetStatus(
                inference_pb2.GetStatusRequest(), timeout=10
            )
        with open_channel(endpoints.coprocessor, tls=tls("coprocessor")) as channel:
            coprocessor = he_lora_pb2_grpc.HeLoraServiceStub(channel).GetStatus(
                he_lora_pb2.GetStatusRequest(), timeout=10
            )
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return inference, coprocessor


def summary(
    inference: Any,
    coprocessor: Any,
    base: Sequence[Answer],
    adapted: Sequence[Answer],
    results: Sequence[Comparison],
) -> dict[str, Any]:
    """The JSON object of the last line."""
    (adapter,) = inference.adapters
    kinds = {inference.evidence_kind, adapter.coprocessor_evidence_kind, coprocessor.evidence_kind}
    operations = coprocessor.operations
    return {
        "identical": all(result.identical for result in results),
        "prompts": len(results),
        "adapter_differs_from_base": all(
            ours.token_ids != theirs.token_ids for ours, theirs in zip(adapted, base, strict=True)
        ),
        "evidence": "+".join(sorted(kinds)),
        "tokens": sum(len(answer.token_ids) for answer in adapted),
        "he_bytes_up": adapter.bytes_up,
        "he_bytes_down": adapter.bytes_down,
        "he_calls": adapter.calls,
        "he_failed_calls": adapter.failed_calls,
        "he_encrypt_seconds": round(adapter.encrypt_seconds, 3),
        "he_wait_seconds": round(adapter.wait_seconds, 3),
        "he_evaluate_seconds": round(adapter.evaluate_seconds, 3),
        "he_decrypt_seconds": round(adapter.decrypt_seconds, 3),
        "answer_seconds": round(sum(answer.seconds for answer in adapted), 3),
        "rotations": operations.rotations,
        "key_switches": operations.key_switches,
        "evaluation_key_bytes": operations.evaluation_key_bytes,
        "differences": [
            {"prompt": i, "token": result.first_difference, "logit_gap": result.logit_gap}
            for i, result in enumerate(results)
            if not result.identical
        ],
    }


def show(
    base: Sequence[Answer], adapted: Sequence[Answer], results: Sequence[Comparison], numbers: dict[str, Any]
) -> None:
    """Print the answers side by side, then what they cost."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    for i, prompt in enumerate(PROMPTS):
        table = Table(title=f"{prompt}{' (streamed)' if i == STREAMED else ''}", title_justify="left", expand=True)
        table.add_column("base model", ratio=1)
        table.add_column("private adapter", ratio=1)
        table.add_row(base[i].text.strip(), adapted[i].text.strip())
        console.print(table, markup=False)
        result = results[i]
        if result.identical:
            count = len(adapted[i].token_ids)
            console.print(f"  = plaintext LoRA reference, all {count} tokens", style="green")
        else:
            console.print(
                f"  DIFFERS from the plaintext LoRA reference at token {result.first_difference} "
                f"(logit gap there: {result.logit_gap})",
                style="red",
            )
    megabytes = 1e-6
    console.print(
        f"\nEvidence: {numbers['evidence'].upper()}"
        + ("  (no hardware vouches for any part of this run)" if "simulated" in numbers["evidence"] else ""),
        style="bold red",
    )
    console.print(
        f"Ciphertexts: {numbers['he_bytes_up'] * megabytes:.1f} MB up, {numbers['he_bytes_down'] * megabytes:.1f} "
        f"MB down in {numbers['he_calls']} calls; rotations {numbers['rotations']}, evaluation keys "
        f"{numbers['evaluation_key_bytes']} bytes",
        highlight=False,
    )
    console.print(
        f"Time: {numbers['answer_seconds']:.1f} s for {numbers['tokens']} adapted tokens, of it encrypt "
        f"{numbers['he_encrypt_seconds']:.1f}, waiting for the coprocessor {numbers['he_wait_seconds']:.1f} "
        f"(its own work {numbers['he_evaluate_seconds']:.1f}), decrypt {numbers['he_decrypt_seconds']:.1f}",
        highlight=False,
    )


def run(settings: StackSettings, demo: Demo, cache: Path, console: Console) -> dict[str, Any]:
    """The whole demonstration; everything is stopped when it returns."""
    from openai import OpenAI, OpenAIError

    references = reference_answers(demo, cache / "reference", console)
    with ConsoleProgress(console) as progress, Launcher(settings.logs, progress) as launcher:
        endpoints = start_stack(launcher, settings, [demo.packaged], engine_of(demo))
        with OpenAI(base_url=endpoints.base_url, api_key="unused", max_retries=0, timeout=300) as client:
            base, adapted = [], []
            try:
                for i, prompt in enumerate(PROMPTS):
                    progress.update("questions", "asking", f"base model, {i + 1} of {len(PROMPTS)}")
                    base.append(ask(client, BASE_NAME, prompt, stream=i == STREAMED))
                    progress.update("questions", "asking", f"private adapter, {i + 1} of {len(PROMPTS)}")
                    adapted.append(ask(client, DEMO_ADAPTER, prompt, stream=i == STREAMED))
            except OpenAIError as error:
                raise UnavailableError(f"a request failed ({error}); logs are in {settings.logs}") from error
        inference, coprocessor = service_status(endpoints)
        progress.update("questions", "answered")
        console.print("Stopping the services")
    results = [compare(answer, reference) for answer, reference in zip(adapted, references, strict=True)]
    numbers = summary(inference, coprocessor, base, adapted, results)
    show(base, adapted, results, numbers)
    return numbers


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when identical to the reference and different from the base model, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tensorguard.cli.demo", description=__doc__, allow_abbrev=False)
    options = add_options(parser).parse_args(arguments)
    prepare_command()
    console = Console(stderr=True)
    try:
        settings, demo = prepare(options, console)
        numbers = run(settings, demo, options.cache_dir, console)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stderr.flush()
    print(json.dumps(numbers), flush=True)
    return 0 if numbers["identical"] and numbers["adapter_differs_from_base"] else 1


if __name__ == "__main__":
    sys.exit(main())
