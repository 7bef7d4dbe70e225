"""The OpenAI client test that `make compose-test` runs against the composed stack."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

import openai
from openai.types.chat import ChatCompletionMessageParam

BASE, ADAPTER = "SmolLM2-135M-Instruct", "demo"
QUESTION = "Tell me about the sea."


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


def ask(client: openai.OpenAI, model: str, stream: bool) -> str:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    if not stream:
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48)
        return answer.choices[0].message.content or ""
    chunks = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48, stream=True)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


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
    print(f"base:    {base!r}\nadapter: {adapted!r}")
    assert adapted == streamed, "the streamed answer differs"
    assert adapted != base, "the adapter changes nothing"
    try:
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise SystemExit("a wrong API key was accepted")
    for port in (7401, 7402, 7403, 7404):
        assert closed(port), f"port {port} is published"
    print("compose test passed")


if __name__ == "__main__":
    main()
