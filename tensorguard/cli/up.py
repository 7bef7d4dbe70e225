"""`make up` and `make down`: the demo's services in the background, and how to talk to them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tensorguard.cli.demo_setup import BASE_NAME, DEMO_ADAPTER, add_options, engine_of, prepare
from tensorguard.errors import TenSafeError, UnavailableError
from tensorguard.stack.command import prepare_command
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.progress import ConsoleProgress
from tensorguard.stack.settings import StackSettings, load_stack_settings
from tensorguard.stack.stack import Endpoints, start_stack

GRPCURL = """\
grpcurl:
  .venv/bin/grpcurl -plaintext {inference} tensafe.inference.v1.InferenceService/ListModels
"""
WITH_TLS = """\
The other services talk to callers with a certificate of {authority} only.
"""

MODULE = "tensorguard.cli.up"
STOP_SECONDS = 90.0

USAGE = """\

Base model and private adapter answer on {url} (evidence: SIMULATED). Stop with `make down`.

curl:
  curl {url}/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{adapter}", "messages": [{{"role": "user", "content": "Tell me about the sea."}}]}}'

{grpcurl}
Python:
  from openai import OpenAI
  client = OpenAI(base_url="{url}", api_key="unused")
  for model in ("{base}", "{adapter}"):
      answer = client.chat.completions.create(model=model, messages=[{{"role": "user", "content": "Hello!"}}])
      print(model, "->", answer.choices[0].message.content)
"""


def state_file(settings: StackSettings) -> Path:
    """Says which process keeps the services, and where they listen."""
    return settings.state_dir / "stack.json"


def running(settings: StackSettings) -> dict[str, object] | None:
    """The contents of the state file if the process it names is still ours."""
    try:
        state: dict[str, object] = json.loads(state_file(settings).read_text())
        pid = int(str(state["pid"]))
    except (OSError, ValueError, KeyError):
        return None
    return state if _is_ours(pid) else None


def _is_ours(pid: int) -> bool:
    """Whether `pid` is a process that keeps services, and not one that took the number later."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return MODULE.encode() in command and b"serve" in command


def up(options: argparse.Namespace, arguments: list[str], console: Console) -> None:
    """Start a background process that starts the services, and show its progress until it is ready."""
    settings, _ = prepare(options, console)
    if running(settings) is None:
        log = settings.logs / "launcher.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        state_file(settings).unlink(missing_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            for line in _lines(log, process, settings):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    else:
        console.print("Running already")
    state = running(settings)
    if state is None:
        raise UnavailableError(f"the services did not start; see {settings.logs}")
    address = f"http://{state['gateway']}/v1"
    grpcurl = (WITH_TLS if state.get("authority") else GRPCURL).format_map(state)
    print(USAGE.format(url=address, grpcurl=grpcurl, base=BASE_NAME, adapter=DEMO_ADAPTER))


def _lines(log: Path, process: subprocess.Popen[bytes], settings: StackSettings) -> Iterator[str]:
    """New lines of the log until the services are ready. Raises UnavailableError when the process ends."""
    with log.open(encoding="utf-8", errors="replace") as stream:
        while True:
            ended, ready = process.poll() is not None, state_file(settings).exists()
            yield from (line.rstrip("\n") for line in stream)
            if ready:
                return
            if ended:
                raise UnavailableError("the services did not start; the lines above say why")
            time.sleep(0.1)


def serve(options: argparse.Namespace, console: Console) -> None:
    """The background process: start the services, say so in the state file, watch them until SIGTERM."""
    settings, demo = prepare(options, console)
    with ConsoleProgress(console) as progress, Launcher(settings.logs, progress) as launcher:
        endpoints = start_stack(launcher, settings, [demo.packaged], engine_of(demo))
        with _announced(settings, endpoints):
            launcher.wait()


@contextlib.contextmanager
def _announced(settings: StackSettings, endpoints: Endpoints) -> Iterator[None]:
    file = state_file(settings)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), **asdict(endpoints)}) + "\n")
    temporary.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def down(options: argparse.Namespace, console: Console) -> None:
    """Stop what `up` started and wait until it is gone."""
    settings = load_stack_settings(state_dir=options.state_dir)
    state = running(settings)
    if state is None:
        console.print("Nothing is running")
        state_file(settings).unlink(missing_ok=True)
        return
    pid = int(str(state["pid"]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _is_ours(pid):  # it ends only after all its services have
        if time.monotonic() > deadline:
            raise UnavailableError(f"process {pid} did not stop within {STOP_SECONDS:g} s; see {settings.logs}")
        time.sleep(0.1)
    console.print("Stopped")


def main(arguments: list[str] | None = None) -> int:
    """Command line: `up`, `down`, and `serve`, which is what `up` runs in the background."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m tensorguard.cli.up", description=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=("up", "down", "serve"))
    options = add_options(parser).parse_args(given)
    prepare_command()
    console = Console(stderr=True)
    try:
        if options.command == "up":
            up(options, [argument for argument in given if argument != "up"], console)
        elif options.command == "serve":
            serve(options, console)
        else:
            down(options, console)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
