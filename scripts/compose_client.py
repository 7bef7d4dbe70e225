"""The OpenAI client test that `make compose-test` runs against the composed stack.

The adapter's answer, streamed and not, must equal that of unmodified PEFT in plaintext, token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam

from tensorguard.models.smollm2 import prepare_smollm2

BASE, ADAPTER = "SmolLM2-135M-Instruct", "demo"
TOKENS = 48
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me about the sea."}]
ROOT = Path(__file__).resolve().parent.parent


def wait_ready(client: openai.OpenAI, seconds: float) -> None:
    """Until /v1/models answers; shows that time passes."""
    begun = time.monotonic()
    while True:
        try:
            client.models.list()
        except openai.APIError as error:
            elapsed = time.monotonic() - begun
            if elapsed > seconds:
                raise SystemExit(f"the gateway did not answer within {seconds:g} s: {error}") from None
            print(f"\rwaiting for the gateway: {elapsed:4.0f} s", end="", file=sys.stderr, flush=True)
            time.sleep(2)
        else:
            print(file=sys.stderr)
            return


def ask(client: openai.OpenAI, model: str, stream: bool) -> list[int]:
    """Token ids of the greedy answer."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS}
    options["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    if not stream:
        answer: Any = client.chat.completions.create(model=model, messages=MESSAGES, **options)
        return list(answer.choices[0].token_ids)
    chunks: Any = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **options)
    return [token for chunk in chunks for choice in chunk.choices for token in getattr(choice, "token_ids", None) or []]


def reference() -> list[int]:
    """What PEFT answers from the original safetensors, in a process of its own."""
    model = prepare_smollm2(ROOT / ".cache" / "models", lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        prompts, answers = Path(folder) / "prompts.json", Path(folder) / "answers.json"
        prompts.write_text(json.dumps([{"messages": MESSAGES}]))
        command = [sys.executable, "-m", "tensorguard.models.reference", "--model", str(model)]
        command += ["--adapter", str(ROOT / "examples" / "demo_adapter" / "adapter"), "--prompts", str(prompts)]
        command += ["--max-tokens", str(TOKENS), "--ignore-eos", "--json", str(answers)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return list(json.loads(answers.read_text())[0]["token_ids"])


def closed(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--wait-seconds", type=float, default=600)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}/v1"
    client = openai.OpenAI(base_url=url, api_key=os.environ["TENSAFE_API_KEY"], max_retries=0)
    wait_ready(client, options.wait_seconds)
    names = {model.id for model in client.models.list()}
    assert {BASE, ADAPTER} <= names, names
    base, adapted, streamed = (ask(client, *which) for which in ((BASE, False), (ADAPTER, False), (ADAPTER, True)))
    assert adapted == streamed, "the streamed answer differs"
    assert adapted != base, "the adapter changes nothing"
    assert adapted == reference(), "the adapter's answer is not the plaintext adapter's"
    try:
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise SystemExit("a wrong API key was accepted")
    for port in (7401, 7402, 7403, 7404):
        assert closed(port), f"port {port} is published"
    print(f"compose test passed: {TOKENS} adapted tokens equal the plaintext reference and differ from the base model")


if __name__ == "__main__":
    main()
