"""One process of the (faulty) coprocessor for each adapter, which can be killed, stopped, spoiled and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.evidence.development import initialise_development_state
from tensorguard.package.writer import pack_adapter
from tensorguard.stack.health import HealthProbe
from tensorguard.stack.process import ServiceSpec
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import running_attestor
from tests.support.faulty_coprocessor import FAULT

ROOT = Path(__file__).resolve().parents[2]
TENANT = "tenant"
START_SECONDS = 120


@dataclass(slots=True)
class CoprocessorProcess:
    """Keeps its address over restarts."""

    connection: AdapterConnection
    spec: ServiceSpec
    fault: Path
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.spec.command, env={**os.environ, **self.spec.environment}, stdout=output, stderr=output, cwd=ROOT
            )

    def wait(self) -> None:
        """Until it serves."""
        deadline = time.monotonic() + START_SECONDS
        with HealthProbe(self.spec) as probe:
            while not probe.healthy():
                assert self.process is not None
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def spoil(self, kind: str) -> None:
        """ "values", "frames", or nothing more with ""."""
        if kind:
            self.fault.write_text(kind)
        else:
            self.fault.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class CoprocessorProcesses:
    """By adapter name."""

    simulated_root_key: Path
    processes: Mapping[str, CoprocessorProcess]


@contextmanager
def coprocessor_processes(folder: Path, model: Path, adapters: Mapping[str, Path]) -> Iterator[CoprocessorProcesses]:
    """Seal PEFT folders (by name) for `model` and serve each from a coprocessor of its own. All are in checked mode."""
    state = initialise_development_state(folder / "state", TENANT)
    publisher, registry = SigningKeys.generate(), AttestorState.open(state.state_dir).packages
    public = folder / "publisher.pem"
    public.write_bytes(publisher.public.to_pem())
    with running_attestor(state) as attestor, ExitStack() as stack:
        processes = {}
        for name, source in adapters.items():
            package = folder / f"{name}.tssp"
            pack_adapter(
                source,
                package,
                base_model_dir=model,
                tenant=TENANT,
                package_id=name,
                sequence=1,
                signing_keys=publisher,
                key_registrar=registry.register,
            )
            address, fault = free_address(), folder / f"{name}.fault"
            options = {
                "--packages": f'["{package}"]',
                "--publisher-keys": f'["{public}"]',
                "--tenant": TENANT,
                "--attestor": attestor,
                "--attestor-thumbprint": state.attestor_thumbprint,
                "--simulated-root-key": str(state.simulated_root_key),
                "--listen": address,
            }
            command = [sys.executable, "-m", "tests.support.faulty_coprocessor"]
            spec = ServiceSpec(
                name=name,
                command=(*command, *(part for pair in options.items() for part in pair)),
                address=address,
                environment={FAULT: str(fault), "PYTHONPATH": str(ROOT)},
            )
            connection = AdapterConnection(
                name=name,
                coprocessor_endpoint=address,
                attestor_endpoint=attestor,
                attestor_thumbprint=state.attestor_thumbprint,
                tenant=TENANT,
                publisher_keys=(public,),
                checked=True,
            )
            process = CoprocessorProcess(connection, spec, fault, folder / f"{name}.log")
            stack.callback(end, process)
            process.launch()
            processes[name] = process
        for process in processes.values():
            process.wait()
        yield CoprocessorProcesses(state.simulated_root_key, processes)


def end(process: CoprocessorProcess) -> None:
    if process.process is not None:
        process.kill()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
